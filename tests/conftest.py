"""Fixtures: a small world on disk whose models are real and real-format, but barely trained."""

import json
import os
import random
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # what is compared is compared on CPUs, also where there is a GPU
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, as below
os.environ["HF_ASSETS_CACHE"] = (kept := tempfile.TemporaryDirectory()).name  # not the user's own

import pytest
import torch

from engine import pretrained, vlm
from world import VERSION, models, scenes

torch.set_num_threads(1)


def pytest_configure(config):
    """`pytest -n auto` (pytest-xdist): the tests of a file share what they have started, and long
    files come early."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """world.build's folder with few rows, an untrained policy and a briefly trained judge."""
    folder = tmp_path_factory.mktemp("world")
    sizes = {"cold_start": 60, "train": 12, "train_shared": 12, "test": 10, "test_pairs": 4}
    scenes.write_data(folder / "data", sizes)
    models.set_seed(0)
    model, processor = models.make_policy(models.make_tokenizer())
    vlm.VLM(model, processor, 3136, 401_408).save(folder / "policy")
    models.train_judge(folder / "judge", steps=45, quiet=True)
    (folder / "world.json").write_text(json.dumps({"version": VERSION, "seed": 0}))
    return folder


@pytest.fixture(scope="session")
def policy(world):
    return pretrained.load(str(world / "policy"), trainable=False)


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture
def double_and_seeded():
    """float64 by default, and the same random numbers in every test: what an equation is checked
    in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, want, tol=1e-12):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), atol=tol, rtol=0)
