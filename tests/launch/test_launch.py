"""The files that launch runs: well formed, in accord with the topology, and with a command line
that `unipic` takes."""

import math
import os
import shlex
import stat
import subprocess

import pytest
import yaml
from conftest import ROOT

from unipic_jax import cli
from unipic_jax.plan import chips

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p.name for p in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.env")])
TOPOLOGIES = ["v4:2x2x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "tpu7x:4x4x4"]


def shell(script, *arguments, **environment):
    return subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True,
                          text=True, env=os.environ | environment, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_every_file_is_in_the_table():
    table = (LAUNCH / "README.md").read_text()
    for file in LAUNCH.iterdir():
        assert f"`{file.name}`" in table or file.name in (
            "README.md", "cpu.sh", "demo.sh", "demo_rl.sh"), file


def takes(command):
    """Whether `unipic` takes a command line, all but the fields of its config."""
    program, *arguments = shlex.split(command)
    assert program == "unipic"
    args, rest = cli.build_parser().parse_known_args(arguments)
    assert args.run in cli.cli_train.TAKE_FIELDS
    assert args.distributed
    assert (ROOT / args.config).is_file()
    assert all(a.startswith("--config.") for a in rest)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_jobset(topology):
    """As many pods as hosts, each with its chips, on nodes of the topology."""
    done = shell("jobset.sh", TOPOLOGY=topology, SLICES="2")
    assert done.returncode == 0, done.stderr
    job, = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    container, = pod["containers"]
    generation, shape = topology.split(":")
    each = container["resources"]["limits"]["google.com/tpu"]
    assert job["replicas"] == 2
    assert spec["parallelism"] == spec["completions"]
    assert spec["parallelism"] * each == math.prod(map(int, shape.split("x")))
    assert spec["backoffLimit"] == 0  # a lost host ends the job, and JobSet starts all of them
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert {v["name"] for v in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    shell_, flag, line = container["command"]
    assert (shell_, flag) == ("bash", "-c")
    takes(line.removeprefix("exec "))
    ports = {str(p["containerPort"]) for p in container["ports"]}
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["JAX_COORDINATOR_PORT"] in ports
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith("/data/")
    assert generation in chips.CHIPS


def test_every_generation_is_known():
    assert {t.split(":")[0] for t in TOPOLOGIES} == set(chips.CHIPS)


@pytest.mark.parametrize(("topology", "message"), [
    ("v9:4x4", "no known generation"), ("v5p:1x1x3", "not whole hosts of 4")])
def test_topologies_that_are_not(topology, message):
    done = shell("jobset.sh", TOPOLOGY=topology)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_sky():
    done = shell("sky.sh", TOPOLOGY="v6e:8x8")
    job = yaml.safe_load(done.stdout)
    assert job["resources"]["accelerators"] == "tpu-v6e-64"
    assert job["file_mounts"]["/data"]["mode"] == "MOUNT"
    takes(job["run"].strip().splitlines()[-1])


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Programs of clouds that note how they are called; `gcloud` has machines from the third
    question on."""
    log = tmp_path / "calls"
    for name in ("gcloud", "xpk", "srun"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"""#!/usr/bin/env bash
printf '%s\\n' "{name} $*" >> {log}
case "$*" in *describe*) [ "$(grep -c describe {log})" -gt 3 ] && echo ACTIVE;; esac
exit 0
""")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda: log.read_text()


def test_xpk(calls):
    assert shell("xpk.sh", TOPOLOGY="v5p:4x4x4", SLICES="2").returncode == 0
    line = calls()
    assert "--tpu-type=v5p-128 --num-slices=2" in line
    takes(line.split("--command=")[1])


def test_tpu_vm(calls):
    """Machines are asked for once, waited for, and given the code and the command."""
    done = shell("tpu_vm.sh", TOPOLOGY="v5e:16x16", POLL="0")
    assert done.returncode == 0, done.stderr
    lines = calls()
    assert lines.count("queued-resources create") == 1
    assert "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite" in lines
    assert lines.index("tpu-vm scp") < lines.index("tpu-vm ssh")
    takes(lines.split("exec ")[1])


def test_tpu_vm_says_what_it_cannot_do(calls):
    for environment, message in (({"TOPOLOGY": "tpu7x:4x4x4"}, "has no TPU VMs"),
                                 ({"SLICES": "2"}, "runs one slice")):
        done = shell("tpu_vm.sh", **environment)
        assert done.returncode == 2
        assert message in done.stderr


def test_slurm(calls):
    done = subprocess.run(["bash", str(LAUNCH / "slurm.sh")], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    takes(calls().split("--kill-on-bad-exit=1 ")[1])
