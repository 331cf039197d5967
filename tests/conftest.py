"""Fixtures: a small world on disk whose models are real and real-format, but barely trained."""

import random

import pytest
import torch

import shapes
import vlm

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """shapes.build's folder with few rows, an untrained policy and a briefly trained judge."""
    folder = tmp_path_factory.mktemp("world")
    sizes = {"cold_start": 60, "train": 12, "test": 10, "test_pairs": 4}
    shapes.write_data(folder / "data", sizes)
    shapes.set_seed(0)
    model, processor = shapes.make_policy(shapes.make_tokenizer())
    vlm.VLM(model, processor, 3136, 401_408).save(folder / "policy")
    shapes.train_judge(folder / "judge", steps=45, quiet=True)
    return folder


@pytest.fixture(scope="session")
def policy(world):
    return vlm.load(str(world / "policy"), trainable=False)


@pytest.fixture
def rng():
    return random.Random(0)
