"""The loop that turns batches of rollouts into optimizer steps and published weights."""
