"""Whether what numbers depend on is what it was, and what of it is not: two JSON-able values beside each other.

Answers of a model (`identity.identity_of_model`) are equal up to rounding; all else is equal or not.
"""

import json
from typing import Any

import torch


def same(saved: Any, now: Any) -> bool:
    """Whether two identities are of the same thing: equal, but for the rounding of answers."""
    if not isinstance(saved, dict) or not isinstance(now, dict):
        return bool(saved == now)
    if saved.keys() != now.keys():
        return False
    return _same_answers(saved, now) if "sketch" in saved else all(same(saved[name], now[name]) for name in saved)


def _same_answers(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    before, after = (torch.tensor(found["sketch"], dtype=torch.float64) for found in (saved, now))
    if before.shape != after.shape:
        return False
    sizes = torch.tensor([saved["sizes"], now["sizes"]], dtype=torch.float64).amax(dim=0)
    return bool(((before - after).norm(dim=1) <= max(saved["tolerance"], now["tolerance"]) * (sizes + 1e-12)).all())


def changes(saved: Any, now: Any) -> str:
    """What is not the same of two JSON-able values, in words; "" where all is."""
    now = json.loads(json.dumps(now))  # as it is on disk
    if not isinstance(saved, dict) or not isinstance(now, dict):
        return "" if same(saved, now) else f"{saved} -> {now}"
    found = []
    for name in dict.fromkeys([*now, *saved]):
        before, after = saved.get(name), now.get(name)
        if same(before, after):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found.append(f"{name}: {_differing(before, after)}")
        else:
            found.append(f"{name}: {before} -> {after}")
    return "; ".join(found)


def _differing(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [name for name in dict.fromkeys([*after, *before]) if not same(before.get(name), after.get(name))]
    return ", ".join(
        f"other {name}" if isinstance(before.get(name), dict) else f"{name} {before.get(name)} -> {after.get(name)}"
        for name in names
    )
