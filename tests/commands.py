# SPDX-License-Identifier: Apache-2.0
"""Commands run in processes of their own, as if some packages were not installed, and what they wrote."""

import json
import os
import subprocess
import sys

import revkernels
from tests.programs import ROOT

# Put before everything else, this makes the named packages look as if they were not installed.
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, *rest)
    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", lambda context: ())
        return () if context.name in {names!r} else find(context)
sys.meta_path[:] = map(Without, sys.meta_path)
from revkernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def revk(*words, without=(), **env):
    start = ["-c", BLOCK.format(names=set(without))] if without else ["-m", "revkernels"]
    command = [sys.executable, *start, *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def tables(path):
    content = json.loads(path.read_text())
    assert content["environment"]["revkernels"] == revkernels.__version__
    return {table["title"]: table for table in content["tables"]}
