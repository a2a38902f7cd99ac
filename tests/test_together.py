"""Laws of steps that many processes do: the same outcome, nobody left behind, and errors that say who failed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.artifacts import Tokens
from tasks.errors import RankLost
from tasks.progress import listening
from tasks.step import ROOT
from tasks.store.manifest import write_manifest
from tasks.train import TrainParams, TrainRuntime, train
from tests.test_train import MORE, RUN, tokens_in
