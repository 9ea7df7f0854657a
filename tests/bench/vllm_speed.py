"""Greedy generation by vLLM on the CPU, timed; run by `.oracle/vllm/bin/python` in a process of its own.

    python vllm_speed.py FOLDER CONTEXT_TOKENS

A line on stdin is a JSON object {"prompts": [[id, ...], ...], "tokens": N}; the answer is a line "answer {...}" on stdout with
the seconds of the call and the new ids.
"""

import json
import os
import sys
import time

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip


def main(folder: str, context_tokens: int) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt  # after the settings above

    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=context_tokens,
        enable_prefix_caching=False,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=call["tokens"], ignore_eos=True, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in call["prompts"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        answer = {"seconds": time.perf_counter() - start, "ids": [list(one.outputs[0].token_ids) for one in outputs]}
        print("answer", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
