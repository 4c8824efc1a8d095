"""The colours of the report's lines stand apart for those who lack one kind of cone, and from the ground, light and dark."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from foreshock.monitors.report_page import asset

LINES = ("c0", "c1", "c2", "c3", "c4", "c5")
SHARED = (
    *LINES,
    "alarm",
    "ink",
)  # what is drawn as a line in one figure: floors and means are ink, alarms are of their colour
APART = 12  # CIEDE2000 between thin lines; 1 is just noticed of large fields side by side
STANDS_OUT = 3  # what WCAG 2.1 asks of graphics, success criterion 1.4.11

# Machado, Oliveira and Fernandes 2009, severity 1, on linear sRGB.
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
SCHEMES = {
    "light": r"^:root \{([^}]*)\}",
    "dark, as the system": r"prefers-color-scheme: dark\) \{ :root[^{]*\{([^}]*)\}",
    "dark, chosen": r':root\[data-theme="dark"\] \{([^}]*)\}',
}


def colours(scheme: str) -> dict[str, np.ndarray]:
    """The variables of the style sheet, as linear sRGB from 0 to 1."""
    [block] = re.findall(SCHEMES[scheme], asset("report.css"), re.MULTILINE)
    return {name: linear(code) for name, code in re.findall(r"--(\w+):\s*#([0-9a-f]+)", block)}


def linear(code: str) -> np.ndarray:
    whole = code if len(code) == 6 else "".join(digit * 2 for digit in code)
    values = np.array([int(whole[at : at + 2], 16) for at in (0, 2, 4)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB, seen in the white of sRGB."""
    share = (XYZ @ rgb) / XYZ.sum(1)
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """CIEDE2000 of two colours in CIELAB, as Sharma, Wu and Dalal 2005 write it."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25.0**7))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = h1 + turn / 2 if c1 * c2 else h1 + h2
    light, chroma, further = (l1 + l2) / 2 - 50, (c1 + c2) / 2, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    waves = ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63))
    t = 1 + sum(size * np.cos(np.radians(times * hue + shift)) for size, times, shift in waves)
    of_light = (l2 - l1) / (1 + 0.015 * light**2 / np.sqrt(20 + light**2))
    of_chroma, of_hue = (c2 - c1) / (1 + 0.045 * chroma), further / (1 + 0.015 * chroma * t)
    bend = np.sin(np.radians(60 * np.exp(-(((hue % 360 - 275) / 25) ** 2))))
    rotation = -2 * bend * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    return float(np.sqrt(of_light**2 + of_chroma**2 + of_hue**2 + rotation * of_chroma * of_hue))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.5, 0), (61, -5, 29), 22.8977),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
    ],
)
def test_the_distance_is_that_of_the_paper(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    """Of table 1 there."""
    assert distance(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_of_one_figure_stand_apart(scheme: str, vision: str) -> None:
    found = colours(scheme)
    seen = {name: lab(np.clip(VISIONS[vision] @ found[name], 0, 1)) for name in SHARED}
    apart = {(a, b): distance(seen[a], seen[b]) for a, b in itertools.combinations(SHARED, 2)}
    assert {pair: round(value, 1) for pair, value in apart.items() if value < APART} == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_stand_out_from_the_ground(scheme: str) -> None:
    found = colours(scheme)
    luminance = {name: float(XYZ[1] @ found[name]) + 0.05 for name in (*SHARED, "card")}
    contrasts = {name: max(x := luminance[name], y := luminance["card"]) / min(x, y) for name in SHARED}
    assert {name: round(value, 1) for name, value in contrasts.items() if value < STANDS_OUT} == {}


def test_both_dark_schemes_are_one() -> None:
    chosen, system = colours("dark, chosen"), colours("dark, as the system")
    assert chosen.keys() == system.keys()
    assert all(np.array_equal(chosen[name], system[name]) for name in chosen)
