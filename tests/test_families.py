"""Every family of the zoo through every check: router, model, generation, policies, files."""

import pytest
import torch

import zoo_checks as checks
from mixtral import INTERPRETED, without_interpreter  # noqa: F401 - a fixture that runs by itself
from moe_gpu.kernels import route
from zoo import AVAILABLE, ZOO

VARIANTS = [
    pytest.param(family, changes, id=f"{family}-{name}")
    for family in AVAILABLE
    for name, changes in ({"default": {}} | family.variants).items()
]


@pytest.fixture(scope="module", params=AVAILABLE, ids=str)
def subject(request):
    """Shared: a check that attaches to the model detaches from it."""
    return checks.Subject(request.param)


@pytest.fixture(scope="module")
def folder(subject, tmp_path_factory):
    return tmp_path_factory.mktemp(subject.family.name)


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_router(family, changes):
    checks.check_router(family, **changes)


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_router_in_bfloat16(family, changes):
    checks.check_router(family, torch.bfloat16, **changes)


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_router_through_the_kernel(family, changes, monkeypatch):
    monkeypatch.setattr(route, "_INTERPRET", INTERPRETED)
    checks.check_router(family, tokens=3, **changes)


def test_logits(subject):
    checks.check_logits(subject)


def test_router_logits(subject):
    if not subject.family.router_logits:
        assert "output_router_logits" not in checks.parameters_of(subject.model.forward)
        pytest.skip("returns none")
    checks.check_router_logits(subject)


@pytest.mark.parametrize("way", checks.GENERATE)
def test_generate(subject, way):
    if way == "static cache" and subject.family.no_static_cache:
        pytest.skip(subject.family.no_static_cache)
    checks.check_generate(subject, way)


def test_implementations(subject):
    checks.check_implementations(subject)


@pytest.mark.parametrize("policy", checks.POLICIES, ids=lambda p: type(p).__name__)
def test_policy(subject, policy):
    checks.check_policy(subject, policy)


def test_zero_budgets(subject):
    checks.check_zero_budgets(subject)


def test_detach(subject):
    checks.check_detach(subject)


def test_save_and_load(subject, folder):
    checks.check_save(subject, folder)
    checks.check_load(subject, folder)
