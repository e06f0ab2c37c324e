"""The data behind the plots."""

import numpy as np

from sae.report.charts import density_chart, render_svg


def test_outlines_of_controls_are_scaled_to_the_live_latents() -> None:
    rng = np.random.default_rng(0)
    latents, neurons = 10 ** rng.normal(-2.5, 0.5, 400), 10 ** rng.normal(-1, 0.2, 50)
    latents[:7], neurons[:3] = 0, 0
    chart = density_chart(latents, 1000, {"raw neurons": neurons, "silent": np.zeros(5)})
    assert chart.columns == ("log₁₀ frequency", "latents", "raw neurons")
    (line,) = [layer for layer in chart.spec["layer"] if layer["mark"]["type"] == "line"]
    points = line["data"]["values"]
    edges = np.unique([point["x"] for point in points])
    counts = np.histogram(np.log10(neurons[3:]), edges)[0]
    np.testing.assert_allclose([point["y"] for point in points[::2]], counts * 393 / 47)
    assert sum(value["n"] for value in chart.spec["data"]["values"]) == 393
    assert "7 latents never fired" in chart.note
    assert "raw neurons" in chart.note
    assert "<svg" in (render_svg(chart) or "<svg")


def test_without_controls_the_bars_stand_alone() -> None:
    chart = density_chart(np.array([0.1, 0.01, 0.0]), 100)
    assert "layer" not in chart.spec
    assert chart.columns == ("log₁₀ frequency", "latents")
