"""The second tier: metrics that peers record and users expect, off by default and switched on by family.

Rows as in `foreshock.monitors.metrics`: name, formula, unit, axis, merge, source, meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")  # whose ranges activations are held against
KINDS: Mapping[str, str] = {
    "activation": "activations",
    "residual": "residual",
    "gradient": "gradients",
    "adam": "adam",
    "update": "updates",
    "expert": "experts",
}  # of each metric's first half its family
COSTS: Mapping[str, str] = {kind: "cheap" if kind in ("activation", "residual") else "weights" for kind in KINDS}
_TENSORS = "q,k,v,out or input"
_BY_DTYPE = f"{_TENSORS}, each by {','.join(DTYPES)}"
_WEIGHTS = "q,k or router"
AXES: Mapping[str, str] = {
    _TENSORS: "a number a tensor: q, k, v and out of an attention, the input of a router",
    _BY_DTYPE: f"the same for each of {', '.join(DTYPES)}",
    _WEIGHTS: "a number a weight: q and k of an attention, that of a router",
    "largest first": "five numbers, the largest first",
}
SOURCES: Mapping[str, str] = {
    "[M]": "arXiv 2402.17762",
    "[O]": "arXiv 2405.19279",
    "[N]": "IEEE 754, arXiv 2209.05433",
    "[D]": "arXiv 1412.6980, 2304.09871",
}


# fmt: off
ROWS: Mapping[str, tuple[tuple[str, str, str, str, str, str, str], ...]] = {
    "activation": (
        ("rms", "sqrt(mean x^2)", "", _TENSORS, "ratio", "[W]", "The size of each tensor as a whole."),
        ("absmax", "max |x|", "", _TENSORS, "max", "[W]", "The largest entry of each tensor."),
        ("kurtosis", "mean x^4 / (mean x^2)^2, about zero", "", _TENSORS, "ratio", "[O]",
         "3 for a centred normal; a rise is outliers that a coarse dtype pays for. NaN once x^4 leaves float32."),
        ("zero", "share of entries that are zero", "", _TENSORS, "ratio", "[O]",
         "A rise is dead channels, masked tokens, or values that have underflowed already."),
        ("underflow", "share of nonzero entries with |x| < the dtype's smallest normal", "", _BY_DTYPE, "ratio", "[N]",
         "These would lose digits in that dtype: 2^-14, 2^-126, 2^-6, 2^-14."),
        ("vanish", "share of nonzero entries with |x| < the dtype's smallest subnormal", "", _BY_DTYPE, "ratio", "[N]",
         "These would be zero or the smallest number there is: 2^-24, 2^-133, 2^-9, 2^-16."),
        ("overflow", "share of nonzero entries with |x| > the dtype's largest finite number", "", _BY_DTYPE, "ratio", "[N]",
         "These would saturate or become infinite: 65504, 3.39e38, 448, 57344. Infinity counts."),
    ),
    "residual": (
        ("rms", "sqrt(mean x^2) of the stream before the attention's sum", "", "scalar", "ratio", "[M]",
         "Growth over depth is usual, over steps it is not."),
        ("absmax", "max |x|", "", "scalar", "max", "[M]", "The largest entry of the stream."),
        ("massive_channels", "channels with max_t |x_tc| > 100 median_c' mean_t |x_tc'|", "count", "scalar", "none", "[M]",
         "Massive activations: a few channels, the same for every input. A new one costs a low-precision run its range."),
        ("top_channels", "the 5 channels with the largest max_t |x_tc|, largest first", "channel", "largest first", "none", "[M]",
         "Which channels those are: they stay the same in a healthy run."),
        ("top_ratio", "max_t |x_tc| / median_c' mean_t |x_tc'| of top_channels", "", "largest first", "none", "[M]",
         "How far they stand out; hundreds to thousands in trained models."),
    ),
    "gradient": tuple(
        (f"{name}_norm", f"norm of the gradient of the {what}, as the optimizer has it", "", axis, "none", "[W]",
         "A rise of one alone points at its site. After clipping, and in units of the loss scale if there is one.")
        for name, what, axis in (("q", "query weight", "heads"), ("k", "key weight", "kv_heads"),
                                 ("router", "router weight", "experts"))
    ),
    "adam": (
        ("exp_avg_rms", "sqrt(mean m^2)", "grad", _WEIGHTS, "none", "[D]", "The size of Adam's mean gradient."),
        ("exp_avg_sq_rms", "sqrt(mean v^2)", "grad^2", _WEIGHTS, "none", "[D]", "The size of Adam's mean squared gradient."),
        ("sign_agreement", "share of entries with v > 0 and | |m^|/sqrt(v^) - 1 | <= 0.1, m^ and v^ without bias", "", _WEIGHTS,
         "none", "[D]", "Gradients of one sign and size: a rise is a drift in one direction, all steps of full length."),
        ("denominator_min", "min sqrt(v^) + eps", "grad", _WEIGHTS, "none", "[D]",
         "Near eps, steps are as large as noise is: a gradient that returns there throws the weight far."),
        ("denominator_max", "max sqrt(v^) + eps", "grad", _WEIGHTS, "none", "[D]", "Outliers of the second moment."),
        ("step", "steps that Adam has counted", "steps", _WEIGHTS, "none", "[D]", "A fall is an optimizer state that was lost."),
    ),
    "update": tuple(
        (f"{name}_ratio", f"|W_after - W_before| / |W_before| of the {what}, one step", "", axis, "none", "[W]",
         "About 1e-3 is usual early on; a rise is a learning rate too large for this head or expert.")
        for name, what, axis in (("q", "query weight", "heads"), ("k", "key weight", "kv_heads"),
                                 ("router", "router weight", "experts"))
    ),
    "expert": (
        ("update_norm", "|W_after - W_before| of each expert over all its weights, one step", "", "experts", "none", "[P]",
         "An expert that gets no tokens moves by weight decay alone; one that moves far more than the rest is overfed."),
        ("update_ratio", "update_norm / |W_before|", "", "experts", "none", "[P]", "As update_norm, free of the expert's size."),
    ),
}
# fmt: on
