"""How a prompt becomes rollouts: in one turn here; in several turns, with tools or in a gym by others to come."""
