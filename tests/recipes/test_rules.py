"""Each rule once: the planner, the trainer and the launchers say the very same sentence."""

import math
from dataclasses import replace
from typing import Any

import pytest
from recipes_drawn import VOCAB, Place
from tiny import with_fields

from launch.compose import checked_layout, compose
from launch.plan.checks import Facts, facts_of, recipe_problems
from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan
from recipes.schema.data import SourceConfig
from recipes.schema.errors import Problem, RecipeError
from recipes.schema.facts import Machine
from recipes.schema.optim import ParameterGroupConfig
from recipes.schema.precision import LinearRule
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.rules import name_problems, notes, problems
from recipes.schema.teacher_rules import tokenizer_problems
from recipes.schema.tools import GenerateConfig
from recipes.schema.typed import FieldError, build
from train.build import check_start
from train.model.backend import this_machine

FP8 = {"precision.scaling": "current", "precision.high_precision_first": 0}
DISTIL = {"objective.kind": "distill"}
CHATS = {"a": SourceConfig("x", kind="chat")}
MEDIA = {"a": SourceConfig("x", kind="media")}
PAIRS = {"a": SourceConfig("x", kind="preference")}
MIXED: dict[str, Any] = {"model.pattern": "ME*E"}
EVERY_RULE: dict[str, tuple[dict[str, Any], str]] = {
    "checks of sums that are turned off": (
        {"run.integrity.collectives": True},
        "run.integrity.collectives=true has no effect, because run.integrity.enabled=false. Set run.integrity.enabled=true.",
    ),
    "experts that the ranks do not divide": (
        MIXED | {"parallel.expert": 3},
        "parallel.expert=3 does not divide model.experts.count=8. Use 1, 2, 4 or 8.",
    ),
    "experts split without a layer of them": (
        {"parallel.expert": 2},
        "parallel.expert=2 splits experts, but model.pattern=M-M* has no `E` layer. Use parallel.expert=1.",
    ),
    "width of experts over expert-tensor ranks": (
        MIXED | {"parallel.expert_tensor": 3},
        "parallel.expert_tensor=3 does not divide model.experts.ffn=512.",
    ),
    "experts over tensor ranks that all have the same tokens": (
        MIXED | {"parallel.tensor": 2},
        "parallel.tensor=2 without parallel.sequence: every tensor rank would send the same tokens to the experts of `E` layers.",
    ),
    "capacity of a part of a microbatch": (
        MIXED | {"model.experts.capacity": 1.5, "parallel.context": 2},
        "model.experts.capacity=1.5 with parallel.tensor=1 and context=2: each rank would count only its part of a microbatch",
    ),
    "more chosen experts than there are": (
        MIXED | {"model.experts.top_k": 9},
        "model.experts.top_k=9 is more than model.experts.count=8. Use at most 8.",
    ),
    "a bias on softmax": (
        MIXED | {"model.experts.score": "softmax"},
        "model.experts.bias_rate=0.001 balances sigmoid scores only, but model.experts.score=softmax.",
    ),
    "groups that do not divide the experts": (
        MIXED | {"model.experts.groups": 3},
        "model.experts.groups=3 does not divide model.experts.count=8. Use one of 1, 2, 4, 8.",
    ),
    "more chosen groups than there are": (
        MIXED | {"model.experts.groups": 2, "model.experts.top_groups": 4},
        "model.experts.top_groups=4 is more than model.experts.groups=2. Use at most 2.",
    ),
    "groups scored by a part of an expert": (
        MIXED | {"model.experts.groups": 4, "model.experts.top_groups": 3},
        "model.experts.top_k=2 from model.experts.top_groups=3 groups of 2 experts: a group is scored by its best",
    ),
    "a rule that decides nothing": (
        {"precision.scaling": "mxfp8", "precision.rules": (LinearRule("none", linears="mixer.qkv"),)},
        "precision.rules[0] (kinds=all, linears=mixer.qkv, last_fraction=1) decides the scaling of no linear layer of "
        "model.pattern=M-M*",
    ),
    "a rule behind one that decides all": (
        {"precision.scaling": "mxfp8", "precision.rules": (LinearRule("current"), LinearRule("none", kinds="M"))},
        "precision.rules[1] (kinds=M, linears=*, last_fraction=1) decides the scaling of no linear layer",
    ),
    "a rule for no kind of layer": (
        {"precision.scaling": "mxfp8", "precision.rules": (LinearRule("none", kinds="X"),)},
        "precision.rules[0] (kinds=X, linears=*, last_fraction=1): X is not a kind of layer. Use letters of M*w-E.",
    ),
    "rules without low precision": (
        {"precision.rules": (LinearRule("mxfp8"),)},
        "precision.rules has 1 rules, but precision.scaling=none: all linear layers are in high precision.",
    ),
    "rules with delayed scaling": (
        {"precision.scaling": "delayed", "precision.rules": (LinearRule("none", kinds="M"),)},
        "precision.rules with delayed scaling: Transformer Engine has one autocast for all linear layers then.",
    ),
    "further depths in Megatron's spelling": (
        {"model.pattern": "M-|M*/*-/*-"},
        "model.pattern=M-|M*/*-/*- names the depths of multi-token prediction, as Megatron writes them. Use model.pattern=M-|M* "
        "model.mtp.pattern=*- model.mtp.depths=2.",
    ),
    "a pipeline cut inside a further depth": (
        {"model.mtp.depths": 1, "model.mtp.pattern": "*|-"},
        "model.mtp.pattern=*|- has a `|`, but all depths are on the last pipeline stage. Use model.mtp.pattern=*-.",
    ),
    "layers of a further depth that do not exist": (
        {"model.mtp.depths": 1, "model.mtp.pattern": "*X"},
        "model.mtp.pattern=*X: character 2 is 'X'.",
    ),
    "further depths without tokens to predict": (
        {"model.mtp.depths": 1, "model.head": "scalar"},
        "model.mtp.depths=1 predicts tokens, but model.head=scalar predicts none.",
    ),
    "further depths beyond the rows": (
        {"model.mtp.depths": 16, "data.row_tokens": 17},
        "model.mtp.depths=16 predicts tokens beyond the rows of data.row_tokens=17. Use at most 15.",
    ),
    "further depths and another objective": (
        {"model.mtp.depths": 1, "objective.kind": "distill"},
        "model.mtp.depths=1 is trained by objective.kind=next_token only, not by distill.",
    ),
    "experts and another objective": (
        MIXED | {"objective.kind": "distill"},
        "objective.kind=distill does not support `E` layers (model.pattern=ME*E).",
    ),
    "rounded weights of experts": (
        MIXED | {"precision.quantize_weights": "int8"},
        "precision.quantize_weights=int8 does not support `E` layers (model.pattern=ME*E).",
    ),
    "one history for many experts": (
        MIXED | {"precision.scaling": "delayed"},
        "precision.scaling=delayed has one history a linear layer, but each expert of an `E` layer would need its own.",
    ),
    "experts in low precision on a GPU": (
        MIXED | FP8 | {"precision.backend": "te"},
        "precision.scaling=current: on the te backend, experts of `E` layers multiply in high precision only.",
    ),
    "te on a cpu": ({"precision.backend": "te", "run.device": "cpu"}, "precision.backend=te needs a GPU."),
    "fp8 weights, emulated": (
        FP8 | {"precision.fp8_weights": True, "precision.backend": "emulated"},
        "only `te` keeps weights in FP8, but precision.backend=emulated. Set fp8_weights=false.",
    ),
    "fp8 weights, delayed scaling, high-precision ends": (
        {"precision.scaling": "delayed", "precision.fp8_weights": True, "precision.high_precision_first": 1},
        "precision.fp8_weights=true with delayed scaling keeps the weights of every layer in FP8.",
    ),
    "fp8 weights of a bf16 recipe": ({"precision.fp8_weights": True}, "fp8_weights=true needs a low-precision recipe."),
    "rounded weights and low precision": (
        FP8 | {"precision.quantize_weights": "int8"},
        "precision.quantize_weights=int8 and a low-precision scaling would both round the weights.",
    ),
    "rounded weights on another backend": (
        {"precision.quantize_weights": "int8", "precision.backend": "emulated"},
        "only the reference backend rounds weights, not emulated. Use precision.backend=reference.",
    ),
    "rounded weights over tensor ranks": (
        {"precision.quantize_weights": "int8", "parallel.tensor": 2},
        "precision.quantize_weights=int8 with parallel.tensor=2: scales of split matrices are not supported.",
    ),
    "groups of weights that do not divide": (
        {"precision.quantize_weights": "int4-g128", "model.ffn": 192},
        "precision.quantize_weights=int4-g128: groups of 128 do not divide the inputs of ",
    ),
    "reference backend in low precision": (
        FP8 | {"precision.backend": "reference"},
        "precision.backend=reference computes in high precision only, but precision.scaling=current.",
    ),
    "unscaled": (
        {"precision.scaling": "unscaled", "precision.backend": "te"},
        "precision.scaling=unscaled is an example of what goes wrong, and only precision.backend=emulated has it.",
    ),
    "no layer left in low precision": (
        {"precision.scaling": "blockwise", "precision.high_precision_first": 2, "precision.high_precision_last": 2},
        "precision.scaling=blockwise, but high_precision_first=2 and high_precision_last=2 keep all 4 layers in high",
    ),
    "ragged tokens of nvfp4": (
        {"precision.scaling": "nvfp4", "data.row_tokens": 17},
        "precision.scaling=nvfp4: a microbatch has 17 tokens per rank, not a multiple of 16.",
    ),
    "vocabulary": (
        {"model.vocab": 256},
        f"has a vocabulary of {VOCAB} (token ids up to {VOCAB - 1}), but model.vocab=256.",
    ),
    "a source missing from the folder": (
        {"data.sources": {"a": SourceConfig("x"), "more": SourceConfig("x")}},
        "has no source more (it has a, b).",
    ),
    "all weights 0": ({"data.sources": {"a": SourceConfig("x", weight=0.0)}}, "data.sources: all weights are 0"),
    "a source that is held out and drawn": (
        {"data.sources": {"a": SourceConfig("x", heldout_fraction=1.0), "b": SourceConfig("x")}},
        "data.sources.a.heldout_fraction=1 holds out the whole source for evaluation, but data.sources.a.weight=1 draws",
    ),
    "chats that see each other": (
        {"data.sources": CHATS},
        "source 'a' has chats, of which a row holds several, and data.reset_at_documents=false lets them see each other.",
    ),
    "chats in another order": (
        {"data.sources": CHATS, "data.fim.rate": 0.5},
        "data.fim.rate=0.5 rearranges documents, but source 'a' has chats, whose order is what is learned.",
    ),
    "a template that cannot be learned": (
        {"data.sources": CHATS, "data.chat.template": "plain"},
        "data.chat.template=plain does not end an answer: a model that learns it would never stop. Use turns",
    ),
    "more left of cut thinking than at most": (
        {"data.sources": CHATS, "data.chat.cut_thinking_min": 9, "data.chat.cut_thinking_max": 8},
        "data.chat.cut_thinking_min=9 is above cut_thinking_max=8.",
    ),
    "chats of a format without records": (
        {"data.sources": {"a": SourceConfig("x", kind="chat", format="text")}},
        "data.sources.a.format=text has no records with messages, which kind=chat needs.",
    ),
    "chats made by a template of texts": (
        {"data.sources": {"a": SourceConfig("x", kind="chat", template="{a}")}},
        "data.sources.a.template makes text of fields, but the source is of kind chat. Set data.chat.template instead.",
    ),
    "chats where there are texts": (
        {"data.sources": CHATS},
        "was prepared as text, and data.sources.a.kind=chat.",
    ),
    "preferences beside other documents": (
        {"data.sources": PAIRS | {"b": SourceConfig("x")}, "data.reset_at_documents": True},
        "data.sources.a has preferences and data.sources.b is of kind text: one run learns from preferences or from documents.",
    ),
    "media without encoders": (
        {"data.sources": MEDIA},
        "data.sources.a has media, and the model has no encoders: it would learn from placeholders instead of images and audio.",
    ),
    "a width of an encoder that the model does not have": (
        {"model.audio.hidden": 64},
        "model.audio.hidden=64 does nothing, because model.audio.layers=0. Set model.audio.layers, such as 12, or leave it out.",
    ),
    "media of a format without records": (
        {"data.sources": {"a": SourceConfig("x", kind="media", format="text")}},
        "data.sources.a.format=text has no records with parts, which kind=media needs. Use jsonl, parquet, webdataset or a set.",
    ),
    "media with a template": (
        {"data.sources": {"a": SourceConfig("x", kind="media", template="{a}")}},
        "data.sources.a.template makes text of fields, but the source is of kind media.",
    ),
    "media that are rearranged": (
        {"data.sources": MEDIA, "data.fim.rate": 0.5},
        "data.fim.rate=0.5 rearranges documents, but source 'a' has media, whose places would be lost. Set it to 0.",
    ),
    "one token for two kinds of media": (
        {"data.sources": MEDIA, "data.media.audio_token": "<|image|>"},
        "data.media.image_token and data.media.audio_token are both '<|image|>'. Name two special tokens.",
    ),
    "tar files of chats": (
        {"data.sources": {"a": SourceConfig("x", kind="chat", format="webdataset")}},
        "data.sources.a.format=webdataset has samples of media, and kind=chat. Set kind to media.",
    ),
    "preferences that see each other": (
        {"data.sources": PAIRS},
        "data.sources.a has preferences, whose answers share a row, and data.reset_at_documents=false lets them see each other.",
    ),
    "preferences whose thinking changes": (
        {"data.sources": PAIRS, "data.chat.strip_thinking_fraction": 0.1},
        "data.chat.strip_thinking_fraction=0.1 changes answers, but those of data.sources.a were compared as they are.",
    ),
    "preferences of a format without records": (
        {"data.sources": {"a": SourceConfig("x", kind="preference", format="text")}},
        "data.sources.a.format=text has no records with messages, which kind=preference needs.",
    ),
    "next tokens of preferences": (
        {"data.sources": PAIRS},
        "objective.kind=next_token, but data.sources.a has preferences: it would learn the rejected answers like the chosen",
    ),
    "distilling preferences": (
        DISTIL | {"data.sources": PAIRS},
        "objective.kind=distill, but data.sources.a has preferences: it would learn the rejected answers like the chosen ones.",
    ),
    "rows longer than a source": (
        {"data.row_tokens": 8192},
        "the heldout part of source 'a' has 401 tokens, fewer than one row of data.row_tokens=8192.",
    ),
    "no data": ({"data.folder": "EMPTY"}, "no prepared data in"),
    "end of document": ({"data.tokenizer.end_of_document": "</s>"}, "the tokenizer has no special token '</s>'."),
    "fill in the middle": (
        {"data.fim.rate": 0.5},
        "data.fim.prefix='<|fim_prefix|>' is not a special token of the tokenizer (it has: <|endoftext|>).",
    ),
    "a reward model with a vocabulary": (
        {"objective.kind": "reward"},
        "objective.kind=reward trains a scalar head, but model.head=vocabulary. Set model.head=scalar.",
    ),
    "next tokens of a scalar head": (
        {"model.head": "scalar"},
        "model.head=scalar predicts no tokens, but objective.kind=next_token needs a distribution over tokens.",
    ),
    "tasks of a scalar head": (
        {"model.head": "scalar", "objective.kind": "reward", "evaluate.tasks": ("needle-1k",)},
        "evaluate.tasks=needle-1k needs a language model, but model.head=scalar.",
    ),
    "no teacher named": (DISTIL, "objective.kind=distill needs objective.teacher or objective.teacher_cache."),
    "no teacher there": (
        DISTIL | {"objective.teacher": "nowhere"},
        "objective.teacher: nowhere is neither a checkpoint",
    ),
    "a damaged teacher": (DISTIL | {"objective.teacher": "DISK/damaged"}, "is complete:"),
    "teacher's vocabulary": (
        DISTIL | {"objective.teacher": "DISK/narrow"},
        f"has a vocabulary of 256, the student (model.vocab) one of {VOCAB + 4}: their distributions cannot be compared.",
    ),
    "teacher's tokenizer": (
        DISTIL | {"objective.teacher": "DISK/foreign"},
        "was trained with another tokenizer (ffffffffffff) than that of",
    ),
    "teacher's degree": (
        DISTIL | {"objective.teacher": "DISK/teacher", "objective.teacher_tensor": 4},
        "at objective.teacher_tensor=4:\nparallel.tensor=4 does not divide model.kv_heads=2, model.mamba_groups=2.",
    ),
    "no teacher cache": (
        DISTIL | {"objective.teacher_cache": "nowhere"},
        "objective.teacher_cache=nowhere is not a teacher cache",
    ),
    "no start": ({"run.start_from": "nowhere"}, "run.start_from: nowhere is neither a checkpoint"),
    "a start of another tokenizer": (
        {"run.start_from": "DISK/foreign"},
        "trained with another tokenizer (ffffffffffff)",
    ),
    "a start of another model": (
        {"run.start_from": "DISK/teacher"},
        "has weights of another model (model.ffn: 192 in the checkpoint, 128 in the recipe; ",
    ),
    "resume required": ({"checkpoint.resume": "required"}, "has no checkpoint. Use checkpoint.resume=auto"),
    "resume never": (
        {"checkpoint.resume": "never", "run.name": "began"},
        "checkpoint.resume=never, but DISK/began/checkpoints already has step_00000003.",
    ),
    "a folder of something else": ({"run.name": "thesis"}, "is not empty (chapter.tex)"),
    "a run of another recipe": ({"run.name": "began", "optim.lr": 0.5}, "optim.lr: 0.001 in the run's folder, 0.5 now"),
    "a group without parameters": (
        {"optim.groups": (ParameterGroupConfig("decoder.layer.*", lr_factor=0.1),)},
        "optim.groups[0].match='decoder.layer.*' matches no parameter of this model. Names look like embedding.word_embeddings",
    ),
    "a group behind another": (
        {"optim.groups": (ParameterGroupConfig("*", lr_factor=0.1), ParameterGroupConfig("*norm*", weight_decay=0.1))},
        "optim.groups[1].match='*norm*' matches only parameters of earlier rules, e.g. decoder.layers.0.norm.weight.",
    ),
    "a group that changes nothing": (
        {"optim.groups": (ParameterGroupConfig("*norm*"),)},
        "optim.groups[0] (match='*norm*') sets neither lr_factor nor weight_decay, so it does nothing.",
    ),
    "Muon without Muon": (
        {"optim.muon.momentum": 0.9, "optim.muon.nesterov": False},
        "optim.muon.momentum=0.9 does nothing, because optim.kind=adamw. Use optim.kind=muon, or leave it out.",
    ),
    "a z-loss of another objective": (
        DISTIL | {"objective.z_loss": 1e-4},
        "objective.z_loss=0.0001 does nothing with objective.kind=distill: only the loss of the next token alone has it.",
    ),
    "a z-loss of several tokens": (
        {"objective.z_loss": 1e-4, "model.mtp.depths": 1},
        "objective.z_loss=0.0001 does nothing with model.mtp.depths=1: only the loss of the next token alone has it.",
    ),
    "schedule": ({"schedule.warmup": 50}, "schedule.warmup=50 + schedule.decay=0 steps are longer than the whole"),
    "layout": ({"parallel.tensor": 3}, "parallel.tensor=3 does not divide"),
    "hidden layers": (
        DISTIL | {"objective.teacher": "DISK/teacher", "objective.hidden_match": "mse", "objective.hidden_layers": "x"},
        "objective.hidden_layers='x' is neither `final` nor pairs",
    ),
    "environment": ({"launch.environment": "NCCL_DEBUG"}, "'NCCL_DEBUG' is not NAME=VALUE."),
    "an unknown task": ({"evaluate.tasks": ("needel-1k",)}, "there is no task 'needel-1k'. Did you mean needle-1k?"),
    "no task file": ({"evaluate.tasks": ("DISK/mine.yaml",)}, "evaluate.tasks: there is no task file DISK/mine.yaml."),
    "a task that generates": (
        {"evaluate.tasks": ("reasoning/chain_sum",), "parallel.pipeline": 2},
        "evaluate.tasks: reasoning/chain_sum needs generated text; parallel.pipeline=2 only scores text. Leave it out, and run",
    ),
    "a task that runs code": (
        {"evaluate.tasks": ("human-eval",)},
        "evaluate.tasks: human-eval runs code that the model wrote.",
    ),
    "samples of a model that generates nothing here": (
        {"evaluate.sample_prompts": ("Once",), "parallel.pipeline": 2},
        "evaluate.sample_prompts needs generated text; parallel.pipeline=2 only scores text. Leave it out, and use",
    ),
    "samples of a scalar head": (
        {"model.head": "scalar", "objective.kind": "reward", "evaluate.sample_prompts": ("Once",)},
        "evaluate.sample_prompts needs a language model, but model.head=scalar. Set evaluate.sample_prompts=[].",
    ),
    "a task longer than a row": ({"evaluate.tasks": ("needle-1k",)}, "needle-1k needs rows of 1,024 tokens, but"),
    "a name too long for the system": ({"run.name": 256 * "x"}, "has a part longer than 200 bytes"),
    "name": ({"run.name": "../up"}, "run.name='../up' has an empty part, `.` or `..`"),
}


def changed(place: Place, changes: dict[str, Any]) -> Recipe:
    values = dict(changes)
    for key, value in changes.items():
        if isinstance(value, str):
            values[key] = value.replace("DISK", place.base.run.folder).replace(
                "EMPTY", f"{place.base.run.folder}/empty"
            )
        elif key == "evaluate.tasks":
            values[key] = tuple(name.replace("DISK", place.base.run.folder) for name in value)
    recipe: Recipe = with_fields(place.base, values)
    return recipe


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_plan_train_and_launch_say_the_same_sentence(rule: str, place: Place) -> None:
    changes, sentence = EVERY_RULE[rule]
    recipe, sentence = changed(place, changes), sentence.replace("DISK", place.base.run.folder)
    found = facts_of(recipe, device_named("h100"))
    here = replace(found, machine=this_machine())
    planned = [str(problem) for problem in recipe_problems(recipe, here, world=1)]
    with pytest.raises(RecipeError) as trained:
        check_start(recipe, world=1)
    with pytest.raises(RecipeError) as launched:
        checked_layout(recipe, processes=1, machine=this_machine(), here=True)
    if rule == "no data":  # the plan may be made on another disk, and warns
        assert planned == [] and "has no prepared data here" in " ".join(warnings_of(recipe))
        assert sentence in str(trained.value) and str(trained.value) == str(launched.value)
        return
    (said,) = (problem for problem in planned if sentence in problem)
    assert said in str(trained.value) and said in str(launched.value)


def warnings_of(recipe: Recipe) -> tuple[str, ...]:
    return make_plan(recipe, world=1, device=device_named("h100")).warnings


def test_a_good_recipe_has_no_problem_and_everything_wrong_comes_at_once(place: Place) -> None:
    check_start(place.base, world=1)
    wrong = changed(
        place,
        {"run.name": "", "schedule.warmup": 50, "parallel.tensor": 3, "data.fim.rate": 0.5, "run.start_from": "nowhere",
         "precision.fp8_weights": True, "checkpoint.resume": "required", "model.vocab": 256},
    )  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        check_start(wrong, world=1)
    for key in ("run.name", "schedule.warmup", "parallel.tensor", "data.fim.prefix", "run.start_from: nowhere",
                "precision.fp8_weights", "checkpoint.resume=required", "model.vocab=256"):  # fmt: skip
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "/abs", "a/../b", "a//b", "a/", "a\nb", "a\x00b", "a\u2028b", "x" * 300, "-rf"]
)
def test_names_that_leave_the_folder_or_break_a_line_are_refused(name: str) -> None:
    (problem,) = name_problems(name)
    assert repr(name) in problem.text and problem.key == "run.name"


@pytest.mark.parametrize("name", ["smoke", "two words", "lr=1e-3,seed=2", "group/one", "größe", "..a"])
def test_names_people_use_are_taken(name: str) -> None:
    assert name_problems(name) == []


def test_numbers_that_no_arithmetic_can_use_are_refused_in_every_field(place: Place) -> None:
    """Infinite, NaN, so small that fp32 rounds to 0, or too large for int64: each is one refusal that names the field."""
    mapping = recipe_mapping(place.base)
    tried = 0
    for group, field, value in [(g, f, v) for g, fields in mapping.items() for f, v in fields.items()]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        odd = [math.inf, -math.inf, math.nan, "1e400", 1e-320] if isinstance(value, float) else [2**63, 10**400]
        for number in odd:
            changed_mapping = mapping | {group: mapping[group] | {field: number}}
            with pytest.raises(RecipeError, match=rf"{group}\.{field}="):
                recipe_from_mapping(changed_mapping)
            tried += 1
    assert tried > 150
    name = next(iter(mapping["data"]["sources"]))
    sources = {name: mapping["data"]["sources"][name] | {"weight": math.inf}}
    with pytest.raises(RecipeError, match=rf"data\.sources\.{name}\.weight=inf is not a finite number"):
        recipe_from_mapping(mapping | {"data": mapping["data"] | {"sources": sources}})


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 1e-30), ("temperature", 1e30), ("top_p", 0.0), ("seed", 2**63)]
)
def test_sampling_options_that_overflow_or_leave_no_token_are_refused(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=f"{field}=.* out of range"):
        build(GenerateConfig, {field: value}, "generate")
    assert build(GenerateConfig, {"temperature": 0}, "generate").temperature == 0


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("group", ["run", "data"])
def test_seeds_out_of_range_are_refused(seed: int, group: str, place: Place) -> None:
    mapping = recipe_mapping(place.base)
    mapping[group]["seed"] = seed
    with pytest.raises(
        RecipeError, match=rf"{group}\.seed={seed} is out of range. Use a value >= 0 and < 9223372036854775808"
    ):
        recipe_from_mapping(mapping)


def test_settings_without_effect_are_noted_and_not_refused(place: Place) -> None:
    recipe = changed(place, {"precision.scaling_after": "mxfp8", "objective.temperature": 2.0})
    prepared = facts_of(recipe, device_named("h100")).prepared
    said = " ".join(str(note) for note in notes(recipe, machine=this_machine(), prepared=prepared))
    assert "precision.scaling_after=mxfp8 is never used" in said and "objective.temperature=2.0" in said
    assert f"model.vocab={VOCAB + 4} is larger than the vocabulary of {VOCAB}" in said
    check_start(recipe, world=1)


@pytest.mark.parametrize(
    ("device", "changes", "part"),
    [
        ("h100", {"precision.scaling": "mxfp8"}, "precision.scaling=mxfp8 needs a Blackwell GPU, but h100 is hopper."),
        ("h100", {"precision.scaling": "mxfp8", "precision.backend": "emulated"}, ""),
        ("h100", {"precision.scaling": "mxfp8", "run.device": "cpu"}, ""),
        ("a100_80gb", {"precision.scaling": "current"}, "(ampere) has no FP8 matrix products."),
        ("h100", {"precision.scaling": "unscaled"}, ""),
        ("h100", {"precision.scaling": "blockwise", "precision.power_of_two_scales": False}, "BLOCK_SCALING_FP32_SCALES=1"),
        ("h100", {"precision.scaling": "blockwise", "precision.power_of_two_scales": False,
                  "launch.environment": "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1"}, ""),
    ],
)  # fmt: skip
def test_what_a_gpu_lacks_matters_only_where_the_gpu_multiplies(
    device: str, changes: dict[str, Any], part: str, place: Place
) -> None:
    recipe = changed(place, {"data.row_tokens": 64, "model.mamba_heads": 16} | changes)
    facts: Facts = facts_of(recipe, device_named(device))
    found = [p for p in recipe_problems(recipe, facts, world=1) if not p.text.startswith("precision.scaling") or part]
    said = " ".join(
        str(problem) for problem in found if problem.key.startswith("precision") and "width" not in problem.text
    )
    assert part in said if part else said == ""


def test_a_gpu_is_asked_for_by_the_same_rule(place: Place) -> None:
    recipe = changed(place, {"run.device": "cuda"})
    (problem,) = problems(recipe, machine=Machine(has_gpu=False))
    assert str(problem) == (
        "run.device=cuda, but there is no GPU on this machine that torch can use. Use run.device=auto or cpu."
    )


def test_another_tokenizer_has_one_wording() -> None:
    assert tokenizer_problems("x", "", "b", where="d", otherwise="o") == []
    assert tokenizer_problems("x", "a", None, where="d", otherwise="o") == []
    (problem,) = tokenizer_problems("x", "a" * 20, "b" * 20, where="runs/data", otherwise="name another run.start_from")
    assert problem == Problem(
        "data.folder",
        "x was trained with another tokenizer (aaaaaaaaaaaa) than that of runs/data (bbbbbbbbbbbb): the same ids stand for other "
        "text.",
        "Use data prepared with the tokenizer of x (data.folder, data.tokenizer.path), or name another run.start_from.",
    )


def test_blocks_that_move_with_the_degree_of_tensor_parallelism_are_noted() -> None:
    """Nemotron Nano 9B's MLP of 15,680 is 122.5 blocks of 128: 61.25 on each of two ranks."""
    words = ["-cn", "smoke", "model=nemotron_nano_9b_v2", "precision=fp8_blockwise"]
    said = {}
    for tensor in (1, 2):
        recipe = compose([*words, f"parallel.tensor={tensor}"], program="plan")
        assert isinstance(recipe, Recipe)
        found = notes(recipe)
        said[tensor] = [str(note) for note in found if note.key == "parallel.tensor"]
    assert said[1] == []
    assert len(said[2]) == 1 and "of `-` (15,680: 61.25 blocks a rank)" in said[2][0], said[2]
