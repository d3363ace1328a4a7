"""parallel: several processes as one, torch's own engine applied from outside the model.

A `World` (rank, size, device) is what everything else asks: is_main, print, data_rank and data_size for rows,
sum(tensor) over ranks with rows of their own, max_over_ranks(*numbers), any(flag), gather(json), barrier().
One process has size 1, where all of it does nothing or the obvious. Ranks lie as (data, context, tensor), the
last one fastest. Gradients are SUMMED over ranks, the loop divides by the weight of all of them.

    options     the keys, and the sizes of the mesh that follow from them
    world       World, start and stop
    fsdp        distribute: ddp, fsdp and hsdp by fully_shard; whole and assign between shares and tensors
    tensor      cut: slices of layers, tp_size
    context     divide_rows: slices of rows, cp_size; Ulysses and Ring in attention
    checkpoint  tensors of many ranks in one folder, by torch.distributed.checkpoint in safetensors files

To add a way to spread a model: a file that changes it from outside, called in fsdp.distribute, and its size
in options and World.
"""
