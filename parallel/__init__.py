"""parallel: several processes as one, and files that are complete or absent.

A `World` (rank, size, device) is what everything else asks: is_main, print, sum(tensor) over ranks in place,
max_over_ranks(*numbers), any(flag), gather(json), barrier(). One process has size 1, where all of it does
nothing or the obvious. Gradients are SUMMED over ranks, the loop divides by the weight of all of them.

    world       World, start and stop, GradientSum, clip_gradients
    atomic      atomic_file, atomic_folder: written aside, flushed, renamed; locked: a place in a cache
"""
