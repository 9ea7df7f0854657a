"""`stratum launch node`: the processes of one node of a cluster, once. The cluster starts it on every node and again if it fails.

    NODE_RANK, MASTER_ADDR, MASTER_PORT --> ranks NODE_RANK x processes ... --> exit status of the trainer

It does what torchrun does for a node, and keeps two things that torchrun loses: the exit status of the rank that failed first
(2: an error that a restart would repeat), and the time to save after a signal.
"""

import functools
import os
import sys
from collections.abc import Mapping, Sequence

from launch.children import python_module, rank_environment
from launch.compose import checked_layout, compose, run_folder
from launch.facts import fp32_block_scales_of
from launch.local.failures import failure_message
from launch.local.rank import set_gloo_interface
from launch.local.supervise import Node, StopRequest, run_attempt, say
from launch.user_errors import exit_status
from recipes.schema import units
from recipes.schema.errors import RecipeError
from recipes.schema.facts import Machine, missing_packages
from recipes.schema.launch_rules import environment_of, processes_per_node
from recipes.schema.options import CommandParser
from recipes.schema.recipe import Recipe

PORT = 29500
"""Of the rendezvous, if MASTER_PORT is not set. Each pod has its own address, so it is free."""
_EXAMPLES = """
stratum launch node -cn smoke run.name=node                 one node
"""
_NOTES = """
Two nodes: NODE_RANK=0 MASTER_ADDR=node0 stratum launch node -cn smoke launch.nodes=2 on the first, NODE_RANK=1 on the second.
`stratum launch kubernetes` starts it in each pod. All nodes need the same run folder. SIGTERM: the processes finish their step,
save and stop. Exit status: 0 finished, 2 an error to fix in the recipe or the data, 3 NaN or infinity, 130/143/138 stopped.
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum launch node`. -> exit status."""
    parser = CommandParser(
        "launch node",
        about="Run the processes of one node of a cluster, without restarts.",
        examples=_EXAMPLES,
        notes=_NOTES,
        recipe=True,
    )
    _, words = parser.parse_recipe(arguments)
    recipe = compose(words, program="launch node")
    if isinstance(recipe, int):
        return recipe
    return exit_status(functools.partial(_run, recipe, words))


def node_of(environment: Mapping[str, str], *, nodes: int) -> Node:
    """This node's place by the environment. RecipeError for variables that are missing or do not fit launch.nodes."""
    number, port = environment.get("NODE_RANK", "0" if nodes == 1 else ""), environment.get("MASTER_PORT", str(PORT))
    address = environment.get("MASTER_ADDR", "127.0.0.1" if nodes == 1 else "")
    if not (number.isdecimal() and int(number) < nodes):
        raise RecipeError(
            f"NODE_RANK={number!r} is not one of the {nodes} nodes (launch.nodes). Set it to 0 ... {nodes - 1}."
        )
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise RecipeError(f"MASTER_PORT={port!r} is not a port. Set it to 1 ... 65535, or leave it out for {PORT}.")
    if not address:
        raise RecipeError("MASTER_ADDR is not set. Set it to the host name or address of node 0.")
    return Node(int(number), nodes, address, int(port))


def _run(recipe: Recipe, words: Sequence[str]) -> int:
    node = node_of(os.environ, nodes=recipe.launch.nodes)
    processes = processes_per_node(recipe)
    machine = Machine(
        has_gpu=recipe.launch.gpus_per_node > 0,
        missing=missing_packages(),
        fp32_block_scales=fp32_block_scales_of(recipe),
    )
    layout = checked_layout(recipe, processes=processes, nodes=node.count, machine=machine, here=True)
    threads = recipe.run.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    defaults = rank_environment(recipe, threads=threads)
    environment = {**defaults, **os.environ, **environment_of(recipe.launch.environment)}
    environment |= {"MASTER_ADDR": node.address, "MASTER_PORT": str(node.port)}
    set_gloo_interface(environment)
    run = run_folder(recipe)
    logs = run.logs / f"node-{units.stamp()}-{os.getpid()}-{node.number:05d}"
    say(f"node {node.number} of {node.count}, {processes} processes ({layout.describe()}), logs in {logs}")
    first = node.number * processes
    with StopRequest() as stop:
        end = run_attempt(
            python_module("launch.local.rank", "train", *words),
            processes=processes,
            environment=environment,
            logs=logs,
            shown=frozenset({first}),
            grace_s=recipe.launch.grace_s,
            stop=stop,
            use_terminal=False,
            node=node,
        )
    if end.failures:
        say(failure_message(logs, end.failures, seen_live=frozenset({first})))
    sys.stderr.flush()
    return end.status
