"""examples/cc3m.sh, the paper's recipe, on small shards: by one process, two of one node, and one on each of two nodes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLES, assert_same_end, finish
from pair_files import emoji_with_groups, write_shards

SMALL = "--model small --episode-size 64 --episodes 3 --num-prototypes 8 --head-width 16 --batch-size 8 --save-every 5"
HERE = "--device cpu --teacher none --workers 0 --held-out 0.2 --log-every 1"


def start(way: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "cc3m.sh"), way, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), emoji_with_groups()[0])[0]


def test_one_gpu_is_the_papers_recipe_but_for_what_is_given(shards: str, tmp_path: Path) -> None:
    process = start("one-gpu", "--train-data", shards, "--run-dir", str(tmp_path / "run"), *SMALL.split(), *HERE.split())
    written = finish(process)
    assert process.returncode == 0, written[-3000:]
    kept = json.loads((tmp_path / "run" / "arguments.json").read_text())
    assert (kept["num_prototypes"], kept["batch_size"]) == (8, 8)
    recipe = {"cluster_iterations": 20, "cluster_restarts": 3, "learning_rate": 5e-5, "warmup_steps": 2000, "weight_decay": 0.5}
    assert recipe.items() <= kept.items()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_do_what_one_node_does(shards: str, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    arguments = [["--train-data", shards, "--run-dir", str(run), *SMALL.split(), *HERE.split()] for run in runs]
    process = start("one-node", *arguments[0], PER_NODE="2")
    written = finish(process)
    assert process.returncode == 0, written[-3000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [start("nodes", *arguments[1], NODES="2", NODE=str(node), PER_NODE="1", HEAD=head) for node in range(2)]
    for process in nodes:
        written = finish(process)
        assert process.returncode == 0, written[-3000:]
    assert_same_end(*runs)
    kept = [json.loads((run / "arguments.json").read_text()) for run in runs]
    assert kept[0] == kept[1]
    assert kept[0]["warmup_steps"] == 15625


def test_batch_grows_with_processes_and_prototypes_are_used(shards: str, tmp_path: Path) -> None:
    small = SMALL.replace("--batch-size 8", "").replace("--episode-size 64", "--episode-size 80").split()
    process = start("one-node", "--train-data", shards, "--run-dir", str(tmp_path), *small, *HERE.split(), PER_NODE="1")
    written = finish(process)
    assert process.returncode == 0, written[-3000:]
    assert json.loads((tmp_path / "arguments.json").read_text())["batch_size"] == 64
    assert "clustering 80 pairs into 8 prototypes" in (tmp_path / "log.txt").read_text()


def test_an_unknown_first_argument_is_refused() -> None:
    process = start("eight-gpus")
    assert "one-gpu, one-node or nodes, got 'eight-gpus'" in finish(process)
    assert process.returncode == 2
