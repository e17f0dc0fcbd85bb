"""What examples/ holds: scripts that the shell reads, and commands that the command line takes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import outrider.cli.main as cli
from outrider.server.vllm_engine.command import vllm_version

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = [*sorted(EXAMPLES.glob("*.sh")), EXAMPLES / "slurm.sbatch"]
#: What stands in for Slurm: a step's command is run once for each of its nodes.
SRUN = """\
for word in "$@"; do case $word in --nodes=*) nodes=${word#--nodes=};; --*) ;; *) break;; esac; shift; done
for node in $(seq 0 $((nodes - 1))); do SLURM_NODEID=$node "$@"; done
"""
SCONTROL = 'printf "one\\ntwo\\nthree\\n"\n'
PLACEMENT = {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "1", "SERVER_HOSTS": "10.0.0.8 10.0.0.9", "OUTRIDER_API_KEY": "k"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def dry_run(script: str, directory: Path) -> str:
    """What a script's commands would do."""
    ours = f'exec {shlex.quote(sys.executable)} -m outrider.cli.main "$@"\n'
    for name, text in {"outrider": ours, "srun": SRUN, "scontrol": SCONTROL}.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (directory / name).chmod(0o755)
    environment = {**os.environ, **PLACEMENT, "PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(
        [str(EXAMPLES / script), "--dry_run"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_nodes(tmp_path: Path) -> None:
    said = dry_run("two_nodes.sh", tmp_path)
    assert "2 nodes x 8 = 16 processes, this is node 1 (NPROC_PER_NODE=8)" in said
    assert "servers: http://10.0.0.8:8000 http://10.0.0.9:8000" in said
    assert "32 prompts x 8 rollouts = 256 rollouts a batch" in said


def test_slurm(tmp_path: Path) -> None:
    said = dry_run("slurm.sbatch", tmp_path)
    for node in (0, 1):
        assert f"2 nodes x 8 = 16 processes, this is node {node} (NPROC_PER_NODE=8)" in said
    assert "servers: http://three:8000" in said


class Manifest:
    """The parts of examples/kubernetes.yaml by kind and name."""

    def __init__(self) -> None:
        documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
        self.parts = {(part["kind"], part["metadata"]["name"]): part for part in documents}

    def pod(self, kind: str, name: str) -> dict[str, Any]:
        pod: dict[str, Any] = self.parts[kind, name]["spec"]["template"]["spec"]
        return pod

    def environment(self, kind: str, name: str) -> dict[str, Any]:
        [container] = self.pod(kind, name)["containers"]
        return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


def test_the_kubernetes_manifest_fits_together() -> None:
    manifest = Manifest()
    job = manifest.parts["Job", "outrider-trainer"]["spec"]
    environment = manifest.environment("Job", "outrider-trainer")
    assert job["completionMode"] == "Indexed"
    assert int(environment["NNODES"]) == job["completions"] == job["parallelism"]
    assert "job-completion-index" in environment["NODE_RANK"]["fieldRef"]["fieldPath"]
    # Pod 0 by its name under the headless service, whose selector finds it.
    headless = manifest.parts["Service", "outrider-trainer"]["spec"]
    assert headless["clusterIP"] == "None"
    assert manifest.pod("Job", "outrider-trainer")["subdomain"] == "outrider-trainer"
    assert environment["MASTER_ADDR"] == "outrider-trainer-0.outrider-trainer"
    for kind, name in (("Job", "outrider-trainer"), ("Deployment", "outrider-server")):
        labels = manifest.parts[kind, name]["spec"]["template"]["metadata"]["labels"]
        assert manifest.parts["Service", name]["spec"]["selector"] == labels
        assert manifest.environment(kind, name)["OUTRIDER_API_KEY"] == {
            "secretKeyRef": {"name": "outrider", "key": "api-key"}
        }
        pod = manifest.pod(kind, name)
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        assert "/dev/shm" in mounted.values()


@pytest.mark.parametrize(("kind", "name"), [("Job", "outrider-trainer"), ("Deployment", "outrider-server")])
def test_the_command_line_takes_the_manifests_commands(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest()
    for variable, value in {**manifest.environment(kind, name), "NODE_RANK": "1"}.items():
        if isinstance(value, str):
            monkeypatch.setenv(variable, value)
    [container] = manifest.pod(kind, name)["containers"]
    program, *words = container["command"]
    assert program == "outrider"
    if kind == "Deployment":
        monkeypatch.setenv("OUTRIDER_API_KEY", "k")
        if vllm_version() is None:
            pytest.skip("vLLM is not installed, whose own command --dry_run prints")
    assert cli.main([*words, "--dry_run"]) == 0
    said = capsys.readouterr().out
    if kind == "Job":
        assert "2 nodes x 8 = 16 processes, this is node 1" in said
        assert "servers: http://outrider-server:8000" in said
