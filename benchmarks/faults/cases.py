"""Every case of the benchmark: what is done to the run, and, decided beforehand, what a right answer is.

A case's group is the first part of its name. ``kernel``, ``rate``, ``logits``, ``router``, ``weights``, ``loop``, ``data`` and
``several`` are faults; ``control`` looks like one and harms nothing; ``healthy`` and ``odd`` runs should raise no alarm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import injections as make
from injections import Injection, Jump
from training import cosine

from foreshock.demo.kernel import Fault
from foreshock.demo.rounding import Flip, Rounding, Stochastic
from foreshock.demo.train import WARMUP, Ramp

LOW_PRECISION = "low-precision attention kernel"
FORWARD, BACKWARD = "wrong attention forward", "wrong attention backward"
ALTERED, SCALE = "altered queries or keys in the kernel", "wrong softmax scale or mask"
RATE, ROUTER_RATE = "learning rate too large", "router learning rate too large"
LOGITS, BALANCE, COLLAPSE, DEAD = "attention-logit growth", "load-balance fault", "router collapse", "dead experts"
DATA, NONFINITE, WEIGHT, CORRUPTION = "data fault", "non-finite values", "corrupted weight", "silent data corruption"
STILL, GRADIENT, UNKNOWN = "weights that no longer move", "gradient scale changed", "unknown"
KERNEL = (LOW_PRECISION, ALTERED, SCALE, FORWARD, BACKWARD, CORRUPTION)
ROUTER = (ROUTER_RATE, BALANCE, COLLAPSE, DEAD, "wrong router backward", "wrong expert choice")
HEALTHY_GROUPS = ("healthy", "odd")


@dataclass(frozen=True)
class Case:
    """``accepted``: mechanisms that are right, of which an alarm must name one. ``sites``: shell pattern of the names of sites
    that are right, with the run's own name ``""``; None where any is.

    ``damages``: whether the loss is expected to suffer, so that a warning can come in time, and is judged by that. ``until``: share
    of the steps after the fault's start that is needed. ``scratch``: from the first step on, instead of from the healthy run's
    checkpoint.
    """

    name: str
    note: str
    injection: Injection
    accepted: tuple[str, ...] = ()
    sites: str | None = None
    subjects: tuple[str, ...] = ("moe",)
    damages: bool = True
    until: float = 1.0
    scratch: bool = False

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


BOTH = ("moe", "dense")
DENSE = ("dense",)
ATTENTION, FIRST = "layers.*.attention*", "layers.0.attention*"
EXPERTS = "layers.*.experts*"


def _kernel(
    name: str,
    note: str,
    fault: Fault,
    accepted: tuple[str, ...] = (LOW_PRECISION,),
    sites: str = ATTENTION,
    subjects: tuple[str, ...] = ("moe",),
    damages: bool = True,
    until: float = 0.4,
    steps: int | None = None,
) -> Case:
    injection = Injection(kernel=fault, kernel_steps=steps)
    return Case(f"kernel/{name}", note, injection, accepted, sites, subjects, damages, until)


# fmt: off
CASES: tuple[Case, ...] = (
    Case("healthy/constant", "nothing goes wrong", make.NOTHING, subjects=BOTH, damages=False, scratch=True),
    Case("healthy/cosine", "the learning rate falls to a tenth along a cosine", Injection(schedule=cosine(0.1, 1600)),
         subjects=BOTH, damages=False, scratch=True),

    Case("odd/long-warmup", "a warm-up four times as long",
         Injection(schedule=lambda since: min((since + 1) / (4 * WARMUP), 1.0)), subjects=BOTH, damages=False, scratch=True),
    Case("odd/restart", "the learning rate falls along a cosine, and warms up again every 600 steps",
         Injection(schedule=lambda since: _restarting(since, 500, 100)), subjects=BOTH, damages=False),
    Case("odd/batch-doubled", "two microbatches a step", Injection(batch=make.double), subjects=BOTH, damages=False),
    Case("odd/batch-halved", "half a batch a step", Injection(batch=make.half), subjects=BOTH, damages=False),
    Case("odd/mixture", "only the last third of the text", Injection(batch=make.last_third), subjects=BOTH, damages=False),
    Case("odd/no-clipping", "gradients are not clipped", Injection(clip=math.inf), subjects=BOTH, damages=False),
    Case("odd/no-decay", "weight decay off", Injection(decays=(0.0, 0.0, 0.0)), subjects=BOTH, damages=False),
    Case("odd/more-decay", "weight decay threefold", Injection(decays=(3.0, 3.0, 3.0)), subjects=BOTH, damages=False),

    _kernel("out-away-1", "O rounded away from zero, to 1 mantissa bit", Fault(out=Rounding(1)), subjects=BOTH, until=1.0),
    _kernel("out-away-1-first", "the same in layer 0 only", Fault(out=Rounding(1), layer=0), sites=FIRST, until=1.0),
    _kernel("out-truncated-0", "O truncated to a power of two", Fault(out=Rounding(0, away=False))),
    _kernel("out-truncated-1", "O truncated to 1 bit", Fault(out=Rounding(1, away=False)), until=1.0),
    _kernel("out-truncated-3", "O truncated to 3 bits", Fault(out=Rounding(3, away=False)), damages=False),
    _kernel("out-truncated-7", "O truncated to the 7 bits of bf16", Fault(out=Rounding(7, away=False)), subjects=BOTH,
            damages=False),
    _kernel("delta-away-1", "only the O in the backward's D, away, 1 bit", Fault(delta=Rounding(1)),
            (BACKWARD,), until=1.0),
    _kernel("delta-away-0", "only the O in the backward's D, away, a power of two", Fault(delta=Rounding(0)),
            (BACKWARD,), subjects=BOTH),
    # Harmless here, and yet a kernel that returns wrong values: the laws are about these.
    _kernel("delta-noise-1", "the error of delta-away-1 with random signs", Fault(delta=Rounding(1), noisy_delta=True),
            (BACKWARD,), damages=False),
    _kernel("out-exact-delta-1", "O away, 1 bit, but an exact D", Fault(out=Rounding(1), exact_delta=True),
            (FORWARD, LOW_PRECISION), damages=False),
    _kernel("p-truncated-0", "P truncated to a power of two", Fault(p=Rounding(0, away=False)),
            (LOW_PRECISION,)),
    _kernel("k-away-0", "K rounded away to a power of two inside the kernel", Fault(k=Rounding(0)), (ALTERED,)),
    _kernel("k-truncated-1", "K truncated to 1 bit inside the kernel", Fault(k=Rounding(1, away=False)), (ALTERED,), damages=False),
    _kernel("k-truncated-2", "K truncated to 2 bits in the kernel", Fault(k=Rounding(2, away=False)), (ALTERED,), damages=False),
    _kernel("scale", "logits scaled by 1/h in place of 1/sqrt(h)", Fault(scale=0.25), (SCALE,)),
    _kernel("mask-early", "a query does not see its own key", Fault(diagonal=-1), (SCALE,)),
    _kernel("mask-late", "a query sees the key after its own", Fault(diagonal=1), (SCALE,), damages=False),
    _kernel("flip-out", "at one step, one exponent bit of one number of O", Fault(flip_out=Flip(26), layer=0),
            (CORRUPTION, NONFINITE), FIRST, damages=False, steps=1),
    _kernel("flip-dk", "at one step, the top exponent bit of one number of dK", Fault(flip_dk=Flip(30), layer=0),
            (CORRUPTION, NONFINITE), FIRST, damages=False, steps=1),

    Case("rate/ramp", "every learning rate x30 over 800 steps", Injection(rates=(Ramp(30, 800),) * 3), (RATE,), None, BOTH,
         until=0.7),
    Case("rate/query-key-ramp", "the learning rate of queries and keys x30 over 800 steps",
         Injection(rates=(make.steady, make.steady, Ramp(30, 800))), (RATE, LOGITS), None, BOTH),
    Case("rate/jump", "every learning rate x10 at once", Injection(rates=(Jump(10),) * 3), (RATE,), None, BOTH, until=0.5),

    Case("logits/growth", "weight decay of queries and keys turns its sign and grows twentyfold",
         Injection(decays=(1.0, 1.0, -20.0)), (LOGITS,), ATTENTION, BOTH),

    Case("router/ramp", "the routers' learning rate x100 over 800 steps",
         Injection(rates=(make.steady, Ramp(100, 800), make.steady)), (ROUTER_RATE,), EXPERTS),
    Case("router/jump", "the routers' learning rate x100 at once",
         Injection(rates=(make.steady, Jump(100), make.steady)), (ROUTER_RATE,), EXPERTS, until=0.6),
    Case("router/balance", "the load-balancing loss turns its sign and grows tenfold", Injection(balance=-10.0),
         (BALANCE,), EXPERTS, until=0.5),
    Case("router/dead-expert", "one expert's router row is pushed away", Injection(before=make.starve_expert),
         (DEAD, WEIGHT, BALANCE), "layers.0.experts*", until=0.4),
    Case("router/silent-expert", "one expert returns zeros", Injection(before=make.silence_expert),
         (DEAD, BALANCE), "layers.0.experts*", until=0.4),

    Case("weights/flip", "one exponent bit of one entry of a query weight", Injection(before=make.flip_weight(26)),
         (WEIGHT, CORRUPTION), FIRST, DENSE, damages=False, until=0.4),
    Case("weights/momentum-flip", "one exponent bit of one entry of the optimizer's first moment",
         Injection(before=make.flip_momentum(26)), (WEIGHT, CORRUPTION), FIRST, DENSE, damages=False, until=0.4),
    Case("weights/stale-head", "one query head is put back after every step",
         Injection(before=make.stale_head, after=make.stale_head), (STILL,), FIRST, DENSE),
    Case("weights/frozen-layer", "no weight of the last layer moves",
         Injection(before=make.frozen_layer, after=make.frozen_layer), (STILL,),
         "layers.1.attention*", DENSE),

    Case("loop/loss-scale", "gradients x1024, never unscaled", Injection(loss_scale=1024.0),
         (GRADIENT,), None, DENSE),
    Case("loop/microbatch", "the gradient of one microbatch of two is lost", Injection(batch=make.half, loss_scale=0.5),
         (GRADIENT,), None, DENSE),
    Case("loop/rotary-offset", "the queries' positions begin at 1", Injection(before=make.shift_queries),
         (DATA, UNKNOWN), None, DENSE, until=0.4),

    Case("data/garbage-5", "5 % of the bytes are random", Injection(batch=make.garbage(0.05)), (DATA,), None, DENSE, until=0.4),
    Case("data/garbage-100", "all bytes are random", Injection(batch=make.garbage(1.0)), (DATA,), None, DENSE, until=0.3),
    Case("data/repeated", "the same 8 batches over and over", Injection(batch=make.repeated(8)), (DATA,), None, DENSE,
         damages=False, until=0.6),

    Case("several/out-and-rate", "O rounded away, 1 bit, and every learning rate x3",
         Injection(kernel=Fault(out=Rounding(1)), rates=(Jump(3),) * 3), (LOW_PRECISION, RATE), None, until=0.6),

    Case("control/delta-noise-5", "the error of D from O at 5 bits, with random signs",  # at 7 the stored O would not change
         Injection(kernel=Fault(delta=Rounding(5), noisy_delta=True)), damages=False, until=0.6),
    Case("control/out-stochastic", "O rounded stochastically to 7 bits", Injection(kernel=Fault(out=Stochastic(7))),
         damages=False, until=0.6),
    Case("control/out-exact-delta-7", "O away, 7 bits, but an exact D",
         Injection(kernel=Fault(out=Rounding(7), exact_delta=True)), damages=False, until=0.6),
)
# fmt: on


def _restarting(since: int, falling: int, rising: int) -> float:
    """Along a cosine from 1 to 0.1 in ``falling`` steps, then linearly back in ``rising``, and again."""
    phase = since % (falling + rising)
    if phase < falling:
        return 0.55 + 0.45 * math.cos(math.pi * phase / falling)
    return 0.1 + 0.9 * (phase - falling) / rising


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
