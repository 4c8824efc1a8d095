"""What foreshock finds in every family of transformers, against a count that does not use its matcher.

    python benchmarks/survey [FAMILY ...] [--out FILE.json] [--attention eager]

Each family's tiny random model (`tiny`) takes one training step three times: eagerly under the `oracle`, which counts attentions
and routers by watching tensors; compiled for foreshock, whose ledger is compared with that count, the names with the model's own,
loss and gradients with those of the eager step; and, where something is missing, compiled for the oracle itself, so that what
Dynamo left to eager is told from what foreshock did not find. One line is printed for each family with a finding. Families run one
after the other in processes of their own, which a family that hangs loses alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import tiny
import torch
import transformers
from making import NotRunError, build, first_line, step
from oracle import Oracle

from foreshock import Watch

SECONDS = 75


def differing(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], exact: bool = False) -> list[str]:
    found = [f"{name}: only in one" for name in mine.keys() ^ wanted.keys()]
    for name in mine.keys() & wanted.keys():
        try:
            kwargs = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(mine[name], wanted[name], equal_nan=True, **kwargs)
        except AssertionError as error:
            found.append(f"{name}: {' '.join(str(error).split())[:160]}")
    return found


def survey(family: str, attention: str | None) -> dict[str, Any]:
    """All there is to say about ``family``, as plain values."""
    model, given, oracle = build(family, attention)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "inputs": {n: list(getattr(x, "shape", ())) for n, x in given.items()},
        "ran": sorted(oracle.ran),
        "attentions": dict(oracle.attentions),
        "routers": dict(oracle.routers),
        "problems": [],
    }
    model.zero_grad()
    torch._dynamo.reset()
    with Watch(every=1, inner="eager", strict=True, detectors=[]) as watch:
        mine = step(model, torch.compile(model, backend=watch.backend), given)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        coverage = watch.coverage
        found["alarms"] = [alarm.message for alarm in watch.alarms]
    for name in ("unmatched", "graph_breaks", "eager", "warnings"):
        found[name] = list(getattr(coverage, name))
    found["sites"] = [_plain(status) for status in coverage]
    problems = found["problems"]
    for kind, expected in (("attention", oracle.attentions), ("router", oracle.routers)):
        by_path: Counter[str] = Counter()
        for status in coverage:
            by_path[status.site.name] += status.evaluations if status.site.kind == kind else 0
        known = Counter({next((p for p in expected if p.endswith(f".{name}")), name): n for name, n in by_path.items()})
        found[f"{kind}_found"] = sum(by_path.values())
        found[f"{kind}_expected"] = sum(expected.values())
        if found[f"{kind}_found"] != found[f"{kind}_expected"]:
            problems.append(
                f"{kind}: {found[f'{kind}_found']} of {found[f'{kind}_expected']}; "
                f"counted {_short(expected - known)}, found {_short(+by_path - expected)}"
            )
    problems += _judged(model, oracle, coverage)
    problems += [f"alarm: {text}" for text in found["alarms"]] + [f"warning: {text}" for text in found["warnings"]]
    gradients = differing(mine, oracle.outcome)
    if gradients:
        model.zero_grad()
        torch._dynamo.reset()
        plain = step(model, torch.compile(model, backend="eager"), given)
        own = differing(mine, plain, exact=True)
        if own:
            problems.append(f"gradients: {len(own)} differ from those of `backend='eager'`, {own[0]}")
        else:
            found["eager_differs"] = gradients[:3]
    if found["attention_found"] < found["attention_expected"]:
        model.zero_grad()
        try:
            found["captured"] = captured(model, given)
            problems[0] += f"; {found['captured']} captured"
        except Exception as error:
            problems[0] += f"; counting in Dynamo's graphs failed: {type(error).__name__}: {first_line(error)}"
    return found


def captured(model: Any, given: dict[str, Any]) -> int:
    """How many attentions stand whole in one of Dynamo's graphs."""
    counts = []

    def backend(module: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            with Oracle() as inner:
                result = module.forward(*args)
            counts.append(sum(inner.attentions.values()))
            return result

        return run

    torch._dynamo.reset()
    step(model, torch.compile(model, backend=backend), given)
    return sum(counts)


def _plain(status: Any) -> dict[str, Any]:
    site = status.site
    weights = {n: getattr(site, n) for n in ("q_weight", "k_weight", "weight")}
    return {
        "name": site.name, "kind": site.kind, "pattern": site.pattern, "evaluations": status.evaluations, "sampled": status.sampled,
        "shape": [site.heads, site.kv_heads, site.head_dim, site.value_dim, site.experts, site.top_k, site.scoring],
        "weights": {n: list(view.names) for n, view in weights.items() if view is not None}, "notes": list(status.notes),
        "laws": {law: reason for law, reason in status.laws.items() if reason},
    }  # fmt: skip


def _judged(model: Any, oracle: Oracle, coverage: Any) -> list[str]:
    """What is wrong with the sites that were found."""
    own, found = dict(model.named_parameters(remove_duplicate=False)), Counter()
    for status in coverage:
        site = status.site
        views = {"q": site.q_weight, "k": site.k_weight} if site.kind == "attention" else {"logits": site.weight}
        where = _layerless(site.name)
        for role, view in views.items():
            if view is None:
                note = next((n for n in status.notes if n.startswith(role) or f"{role} were" in n), "no note")
                found[f"untraced: {role} of {where}: {note}"] += 1
                continue
            if view.resolve() is None:
                found[f"weight gone: {role} of {where}"] += 1
            wrong = [name for name in view.names if name not in own]
            if wrong and not coverage.graph_breaks and not coverage.eager:
                found[f"wrong name: {_layerless(str(wrong))}"] += 1
            elif not wrong and view.resolve() is not None and own[view.names[0]] is not view.resolve():
                found[f"wrong parameter: {_layerless(view.names[0])}"] += 1
        shape = oracle.shapes.get(site.name)
        mine = (site.heads, site.kv_heads, site.head_dim, site.value_dim)
        if site.kind == "attention" and shape is not None and oracle.attentions[site.name] == status.evaluations:
            wrong_shape = (mine[0], *mine[2:]) != (shape[0], *shape[2:]) or shape[1] % (site.kv_heads or 1)
            found[f"shape of {where}: {mine}, the call has {shape}"] += bool(wrong_shape)
        if status.sampled < status.evaluations:
            found[f"not sampled: {where} {status.sampled} of {status.evaluations}"] += 1
    return [f"{text} (x{count})" if count > 1 else text for text, count in found.items() if count]


def _layerless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _short(counts: Counter[str]) -> str:
    merged: Counter[str] = Counter()
    for name, count in counts.items():
        merged[_layerless(name)] += count
    return ", ".join(f"{name or '(root)'} x{count}" for name, count in merged.items()) or "none"


def _child(family: str, attention: str | None, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        result = survey(family, attention)
    except NotRunError as error:
        result = {"not_run": str(error)}
    except BaseException as error:
        where = traceback.format_exc().splitlines()
        result = {"failed": f"{type(error).__name__}: {first_line(error)}", "traceback": where[-40:]}
    pipe.send({"family": family, "seconds": time.perf_counter() - start, **result})


def main(names: list[str], out: str | None, attention: str | None) -> None:
    """Survey the families ``names`` (all if there are none), print what is wrong, write everything to ``out``."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    context = multiprocessing.get_context("fork")
    results: list[dict[str, Any]] = []
    ran: set[str] = set()
    for family in names or tiny.families():
        if not names and family in ran:
            continue  # a part of a family that ran
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(family, attention, theirs))
        process.start()
        theirs.close()
        try:
            result = mine.recv() if mine.poll(SECONDS) else {"family": family, "not_run": f"took over {SECONDS} s"}
        except EOFError:
            result = {"family": family, "not_run": "its process died"}
        process.kill()
        process.join()
        results.append(result)
        ran.update(result.get("ran", ()))
        said = [result[k] for k in ("failed", "not_run") if k in result] + result.get("problems", [])
        if said:
            print(f"{family}: {'; '.join(said)}", flush=True)
        if out is not None:
            with open(out, "w") as file:
                json.dump(results, file, indent=1)
    _summary(results)


def _summary(results: list[dict[str, Any]]) -> None:
    whole = [r for r in results if "sites" in r]
    total = lambda key: sum(r[key] for r in whole)  # noqa: E731
    eager = sum(r["attention_expected"] - r["captured"] for r in whole if "captured" in r)
    print(f"\n{len(whole)} of {len(results)} families ran, {sum(not r['problems'] for r in whole)} without a finding")
    print(
        f"attention: {total('attention_found')} of {total('attention_expected')} evaluations, {eager} were in no graph"
    )
    print(f"routers: {total('router_found')} of {total('router_expected')} evaluations")
    missing = Counter(
        role
        for r in whole
        for s in r["sites"]
        for role in ("q_weight", "k_weight")
        if s["kind"] == "attention" and role not in s["weights"]
    )
    print(f"weights untraced: {dict(missing)}")
    near = Counter(re.sub(r"`[^`]*`|\d+", "*", line).split(" at ")[0] for r in whole for line in r["unmatched"])
    for reason, count in near.most_common():
        print(f"{count:>6} near-misses: {reason}")
    for result in results:
        if "sites" not in result:
            print(f"did not run: {result['family']}: {result.get('failed') or result['not_run']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--out")
    parser.add_argument("--attention", choices=["eager", "sdpa"], help="of transformers; the family's own if not given")
    options = parser.parse_args()
    main(options.families, options.out, options.attention)
