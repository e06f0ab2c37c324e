"""What `sae-pipeline plan` prints."""

from typing import Any

from sae.memory import readable

NOT_COUNTED = "tokenization, evaluation with its controls, statistics and report are not counted"


def plan_lines(found: dict[str, Any]) -> list[str]:
    """The figures of a plan as a table."""
    places, memory, cost, probes = (found[name] for name in ("activations", "memory", "cost", "probes"))
    lines = [f"root        {found['root']}", ""]
    for p in places:
        about = "" if p["counted"] else "about "
        done = f", {p['n_parts_done']:,} of them there" if p["n_parts_done"] else ""
        lines.append(
            f"{'control' if p['control'] else p['split']:<11} {p['hook_point']}: {about}{p['n_rows']:,} x {p['d_in']} "
            f"{p['dtype']}, {readable(p['n_bytes'])}, parts: {p['n_parts']:,}{done}, row groups: {p['n_row_groups']:,}"
        )
    for r in found["remixes"]:
        state = "in the store" if r["done"] else "as much again while it is made"
        kind = "control" if r["control"] else "remix"
        lines.append(f"{kind:<11} {r['hook_point']}: {readable(r['n_bytes'])}, parts: {r['n_parts']:,}, {state}")
    for t in found["saes"]:
        state = "in the store" if t["done"] else f"{t['n_steps']:,} steps, epochs: {t['epochs']:.3g}"
        lines.append(f"{'saes.' + str(t['index']):<11} d_sae {t['d_sae']:,} on {t['n_rows']:,} rows: {state}")
    free = "" if found["free_bytes"] is None else f", {readable(found['free_bytes'])} free there"
    lines += [
        "",
        f"stored      {readable(found['stored_bytes'])} of activations{free}",
        f"requests    {found['requests']['puts']:,} that write or list, {found['requests']['gets']:,} that read "
        f"(on a bucket; without retries)",
        f"memory      extraction {readable(memory['extraction'])}, windows of the loader "
        f"{readable(memory['windows'])}, of {readable(memory['machine'])}",
    ]
    if probes:
        lines += ["", *_probe_lines(probes)]
        lines += [
            f"{'shuffle':<11} batch means of saes.{index} vary {value:.2f} times as much as those of independent rows"
            for index, value in found["batch_variance"].items()
        ]
        lines += _time_lines(found)
    on_bucket = found["root"].startswith("s3://")
    prices = found["prices"]
    machine = f"${cost['machine']:,.2f} at ${prices['hour']:g} per hour of this machine" if probes else ""
    bucket = (
        f"${cost['storage_per_month']:,.2f} a month for storage, ${cost['requests']:,.2f} for requests"
        if on_bucket
        else ""
    )
    if text := ", ".join(filter(None, (bucket, machine))):
        lines.append(f"cost        {text}")
    return lines


def _probe_lines(probes: dict[str, Any]) -> list[str]:
    speed = probes["storage"]
    text = [
        f"root writes {readable(int(speed['write_bytes_per_second']))}/s, reads "
        f"{readable(int(speed['read_bytes_per_second']))}/s, a small read takes {speed['request_seconds'] * 1e3:.2g} ms"
    ]
    if forward := probes.get("forward"):
        text.append(f"forward {forward['tokens_per_second']:,.0f} tokens/s")
    if "subject_step_seconds" in probes:
        text.append(f"step of the subject's training {probes['subject_step_seconds'] * 1e3:.3g} ms")
    for hook_point, rho in ((forward or {}).get("rho") or {}).items():
        text.append(f"rows of one context correlate by {rho:.2g} at {hook_point}")
    text += [f"step of saes.{i} {value * 1e3:.3g} ms" for i, value in probes.get("sae_step_seconds", {}).items()]
    return [f"{'measured' if i == 0 else '':<11} {line}" for i, line in enumerate(text)]


def _time_lines(found: dict[str, Any]) -> list[str]:
    seconds = found["seconds"]
    stages = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    return [f"time        {_duration(sum(seconds.values()))} ({stages}; {NOT_COUNTED})"]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
