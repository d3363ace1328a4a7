"""The systems of bench/decode.py. Each gives run(prompts, new) -> new tokens of every prompt, greedily.

What a system needs is imported in its function, so that a process of a baseline holds nothing of Anvil.
"""

import torch


def anvil(model, cache=None):
    """cache: kept from call to call, with the graphs captured for it; None makes one each time."""
    from generation.generate import GenerateOptions, generate

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        if cache is not None:
            cache.restart(len(prompts))
        greedy = GenerateOptions(do_sample=False, max_new_tokens=new)
        return [text.ids for text in generate(model, prompts, greedy, stop_ids=(), cache=cache)]

    return run


def transformers_generate(model, **more):
    """more: further arguments of generate. Prompts of different lengths are padded on the left."""
    greedy = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0} | more

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, **greedy)[:, longest:].tolist()

    return run


def llama_cpp(path: str, threads: int):
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        result = []
        for prompt in prompts:  # one after the other: the binding has no batches
            model.reset()
            tokens = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
            result.append([next(tokens) for _ in range(new)])
        return result

    return run
