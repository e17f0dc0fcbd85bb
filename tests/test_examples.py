"""What examples/ holds: scripts that the shell reads, and commands that the command line takes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import outrider
import outrider.cli.main as cli
from outrider.server.vllm_engine.command import vllm_version

MODEL = Path(outrider.__file__).parent / "demo" / "model"
EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = [*sorted(EXAMPLES.glob("*.sh")), EXAMPLES / "slurm.sbatch"]
#: What stands in for Slurm: a step's command is run once for each of its nodes.
SRUN = """\
for word in "$@"; do case $word in --nodes=*) nodes=${word#--nodes=};; --*) ;; *) break;; esac; shift; done
for node in $(seq 0 $((nodes - 1))); do SLURM_NODEID=$node "$@"; done
"""
SCONTROL = 'printf "one\\ntwo\\nthree\\n"\n'
NODES = {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "1", "SERVER_HOSTS": "10.0.0.8 10.0.0.9"}
NEEDS_VLLM = pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed, whose command --dry_run prints")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def run(script: str, directory: Path, *words: str, outrider: str = "", **variables: str) -> str:
    """What a script prints. outrider: what stands in for the command, in the shell."""
    ours = (
        'echo "GPUs of a command: ${CUDA_VISIBLE_DEVICES:-all}"\n'
        # Not all machines that run this have eight.
        f'CUDA_VISIBLE_DEVICES="" exec {shlex.quote(sys.executable)} -m outrider.cli.main "$@"\n'
    )
    for name, text in {"outrider": outrider or ours, "srun": SRUN, "scontrol": SCONTROL}.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (directory / name).chmod(0o755)
    fixed = {"MODEL": str(MODEL), "OUTRIDER_API_KEY": "k", "SLURM_JOB_NODELIST": "n"}
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", **fixed, **variables}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dry_run(script: str, directory: Path, *words: str, **variables: str) -> list[str]:
    """What is printed before the first command of ours, and then by each of them."""
    return run(script, directory, *words, "--dry_run", **variables).split("GPUs of a command: ")


def check_server(said: str, gpus: str, *flags: str) -> None:
    assert said.startswith(f"{gpus}\n")
    [command] = [line for line in said.splitlines() if "-m vllm.entrypoints.openai.api_server " in line]
    for part in flags:
        assert f" {part} " in command
    assert "max_steps" not in said


def check_trainer(said: str, gpus: str, *lines: str) -> None:
    assert said.startswith(f"{gpus}\n")
    for line in (*lines, "length: 7 optimizer steps"):
        assert f"    {line}\n" in said


@NEEDS_VLLM
@pytest.mark.parametrize(
    ("script", "servers"),
    [
        ("one_and_one.sh", [("1", "--port 8000 --tensor-parallel-size 1 --data-parallel-size 1")]),
        ("tensor_parallel.sh", [("1,2", "--port 8000 --tensor-parallel-size 2 --data-parallel-size 1")]),
        ("data_parallel.sh", [("1,2", "--port 8000 --tensor-parallel-size 1 --data-parallel-size 2")]),
        ("tensor_and_data_parallel.sh", [("1,2,3,4", "--port 8000 --tensor-parallel-size 2 --data-parallel-size 2")]),
        ("several_servers.sh", [("1", "--port 8000"), ("2", "--port 8001")]),
    ],
)
def test_servers_and_a_trainer(script: str, servers: list[tuple[str, str]], tmp_path: Path) -> None:
    _, *said, trainer = dry_run(script, tmp_path, "--max_steps", "7", ROLLOUT_FLAGS="--seed 3")
    for server, (gpus, flags) in zip(said, servers, strict=True):
        check_server(server, gpus, f"--host 127.0.0.1 {flags}", "--seed 3")
    urls = " ".join(f"http://127.0.0.1:{8000 + number}" for number in range(len(servers)))
    batch = "32 prompts x 8 rollouts = 256 rollouts a batch; 1 optimizer step a batch; 64 micro-batches of 4"
    check_trainer(trainer, "0", batch, f"servers: {urls}")


def test_vllms_own_server(tmp_path: Path) -> None:
    server, trainer = dry_run("stock_server.sh", tmp_path, "--max_steps", "7", ROLLOUT_FLAGS="--seed 3")
    program, *settings, vllm, serve, model = shlex.split(server)[:6]
    assert [program, vllm, serve, model] == ["env", "vllm", "serve", str(MODEL)]
    assert settings == ["CUDA_VISIBLE_DEVICES=1", "VLLM_SERVER_DEV_MODE=1"]
    assert """ --weight-transfer-config '{"backend":"nccl"}' """ in shlex.join(shlex.split(server))
    assert shlex.split(server)[-2:] == ["--seed", "3"]
    check_trainer(trainer, "0", "servers: http://127.0.0.1:8000")
    assert re.search(r"weight_transport +nccl\n", trainer)


def test_two_nodes(tmp_path: Path) -> None:
    _, trainer = dry_run("two_nodes.sh", tmp_path, "--max_steps", "7", **NODES)
    node = "2 nodes x 8 = 16 processes, this is node 1 (NPROC_PER_NODE=8)"
    batch = (
        "32 prompts x 8 rollouts = 256 rollouts a batch; 1 optimizer step a batch; "
        "4 micro-batches of 4 on each of 16 devices"
    )
    check_trainer(trainer, "0,1,2,3,4,5,6,7", node, batch, "servers: http://10.0.0.8:8000 http://10.0.0.9:8000")


@NEEDS_VLLM
def test_server_node(tmp_path: Path) -> None:
    _, server = dry_run("server_node.sh", tmp_path, "--seed", "3")
    check_server(server, "all", "--host 0.0.0.0 --port 8000", "--data-parallel-size 8", "--seed 3")


@NEEDS_VLLM
def test_slurm(tmp_path: Path) -> None:
    _, server, *trainers = dry_run("slurm.sbatch", tmp_path, "--max_steps", "7", ROLLOUT_FLAGS="--seed 3")
    check_server(server, "all", "--host 0.0.0.0 --port 8000", "--data-parallel-size 8", "--seed 3")
    assert len(trainers) == 2
    for number, trainer in enumerate(trainers):
        node = f"2 nodes x 8 = 16 processes, this is node {number} (NPROC_PER_NODE=8)"
        check_trainer(trainer, "all", node, "servers: http://three:8000")


def test_a_server_has_its_own_flags_and_ends_with_the_trainer(tmp_path: Path) -> None:
    stands_in = """\
    case $1 in
      rollout) echo "$*" >part; mv part server; exec sleep 600 >/dev/null 2>&1 ;;
      train) until [ -e server ]; do sleep 0.05; done; cat server; echo "$*" ;;
    esac
    """
    said = run("one_and_one.sh", tmp_path, "--max_steps", "7", outrider=stands_in, ROLLOUT_FLAGS="--seed 3")
    server, trainer = said.splitlines()
    assert server.startswith("rollout ")
    assert server.endswith(" --port 8000 --seed 3")
    assert trainer.startswith("train ")
    assert trainer.endswith(" --vllm_server_port 8000 --max_steps 7")


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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
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
