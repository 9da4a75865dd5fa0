"""Old names of modules: their objects are those of the new modules, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fhopt
from fhopt.cache import LatentCache
from fhopt.moved import MODULES, NAMES
from fhopt.plan import LatentPlan


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_name_leads_to_modules_that_are_there(old: str) -> None:
    if old == "seeing.model_explorer_extension":
        pytest.importorskip("model_explorer")
    sys.modules.pop(f"fhopt.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"fhopt.{old} has moved: import from fhopt"):
        importlib.import_module(f"fhopt.{old}")
    for place in MODULES[old].split():
        importlib.import_module(f"fhopt.{place}")


@pytest.mark.slow
def test_a_name_of_an_old_module_is_the_one_of_the_new() -> None:
    text = (
        "import warnings; warnings.simplefilter('ignore'); import fhopt, fhopt.seeing.drawing;"
        "from fhopt.spec import LatentPlan, Tier; from fhopt.cache import LatentCache; from fhopt.fitting import fit;"
        "from fhopt.head import Head, apply; from fhopt.models import load_model; from fhopt.capture import capture;"
        "from fhopt.evaluate import token_costs; from fhopt.rewriting import rewrite; from fhopt.ops import encode;"
        "print(LatentPlan is fhopt.LatentPlan, LatentCache is fhopt.LatentCache)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


def test_looking_through_all_modules_imports_none_behind_an_old_name() -> None:
    text = (
        "import warnings; warnings.simplefilter('ignore'); import sys, fhopt.spec, fhopt.evaluate;"
        "print([hasattr(m, '__file__') for m in (fhopt.spec, fhopt.evaluate)], 'fhopt.plan.latent_plan' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout == "[False, False] False\n", done.stderr


@pytest.mark.parametrize("old", sorted(NAMES))
def test_a_renamed_class_or_function_keeps_its_old_name_in_the_old_module(old: str) -> None:
    module, _, name = old.partition(".")
    values = [getattr(importlib.import_module(f"fhopt.{place}"), NAMES[old], None) for place in MODULES[module].split()]
    assert getattr(importlib.import_module(f"fhopt.{module}"), name) in values


def test_a_name_that_was_never_there_is_an_error_that_names_the_new_place() -> None:
    old = importlib.import_module("fhopt.spec")
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'; it has moved to fhopt.plan.latent_plan"):
        _ = old.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fhopt.never")


def test_the_package_gives_its_classes() -> None:
    assert fhopt.LatentPlan is LatentPlan and fhopt.LatentCache is LatentCache


def test_packages_that_kept_their_name_hand_on_what_their_module_had() -> None:
    for package in ("cache", "fitting", "lm_head", "models"):
        module = importlib.import_module(f"fhopt.{package}")
        for name in module.__all__:
            assert getattr(module, name) is getattr(importlib.import_module(module._WHERE[name]), name)
        with pytest.raises(AttributeError, match=f"'fhopt.{package}' has no attribute 'nothing'"):
            _ = module.nothing
