"""What a call costs in memory and in products."""

from torch.profiler import ProfilerActivity, profile


def cost(call):
    """Peak of the bytes that torch allocates during ``call`` above those at its start, and multiply-adds of its products."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_flops=True) as p:
        call()
    clock = "start_ns" if hasattr(p.profiler.kineto_results.events()[0], "start_ns") else "start_us"
    allocations = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert allocations
    live = peak = 0
    for event in sorted(allocations, key=lambda e: getattr(e, clock)()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, sum(e.flops for e in p.key_averages()) / 2
