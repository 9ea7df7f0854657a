"""Greedy continuations by vLLM on the CPU, run by `.oracle/vllm/bin/python` in a separate process.

    python vllm_generate.py FOLDER NEW_TOKENS ANSWERS.json [DTYPE] < prompts.json

Prompts are a list of lists of token ids. Each answer holds the new ids and their log-probabilities.
"""

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)


def main(folder: str, new_tokens: int, answers_file: str, dtype: str) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt  # after the settings above

    prompts = json.load(sys.stdin)
    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=max(len(prompt) for prompt in prompts) + new_tokens,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=0, ignore_eos=True, detokenize=False)
    answers = []
    for output in engine.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling):
        completion = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        answers.append({"ids": list(completion.token_ids), "logprobs": logprobs})
    with open(answers_file, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else "float32")
