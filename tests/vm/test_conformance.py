"""Real machines keep what the conformance suite promises, so the fakes that keep it too are honest."""

from __future__ import annotations

import pytest

from appliance.cell.incarnation import Incarnation
from tests.conformance.suite import CHECKS, Check

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_real_machine(check: Check, vm_machine: Incarnation) -> None:
    check(vm_machine)
