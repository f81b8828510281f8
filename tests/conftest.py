"""Shared pieces of the tests: the embedded model, loaded once; optional real data beside the checkout."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # real benchmarks, where they are at hand; tests that want them skip without


@pytest.fixture(scope="session")
def tokenizer():
    return common.load_tokenizer("tiny")


@pytest.fixture(scope="session")
def model():
    """The embedded model in float32. Tests that train copy it."""
    torch.manual_seed(0)
    return common.load_model("tiny", "cpu")


@pytest.fixture()
def sampler(model, tokenizer):
    return common.Sampler(common.TransformersEngine(model), tokenizer)


@pytest.fixture(scope="session")
def problems():
    return common.load_problems("tiny", "validation", 12)


@pytest.fixture(scope="session")
def prompts(tokenizer, problems):
    return [common.prompt_ids(tokenizer, p["problem"]) for p in problems]
