"""A comparison of two diseases: numbers equal to slow twins and scipy, what was left out is said, folders are whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pytest
from barcode_maker import write_patient_barcodes
from PIL import Image
from scipy import stats

from cytosae.compare import Comparison, CompareConfig, bootstrap_stability, compare, correlate
from stores import COMPARISON, ResultStore
from stores.errors import BadInput, DamagedStore, SpecMismatch
from tests_of_cli import fails, run
