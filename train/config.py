"""Every recipe field of the train side, typed and documented. Standard library only: it runs on a login node.

The text under a field is its documentation: meaning, unit, range, and why the default (docs/recipes.md is made from it).
Checks that need more than one field live where the knowledge is: `train.parallel.layout`, `train.recipe`.
"""

from dataclasses import dataclass, field
from typing import Literal

from data.config import DataConfig
from data.fields import Count, Fraction, NonNegativeFloat, OpenFraction, PositiveFloat, PositiveInt, SoftCap


@dataclass(frozen=True)
class RunConfig:
    """What one run is called, how long it lasts, and how big a step is."""

    name: str
    """Name of the run: its files lie in `folder`/`name`."""
    steps: PositiveInt
    """Optimizer steps to train in all (a resumed run counts the steps before it)."""
    folder: str = "runs"
    """Folder of all runs."""
    seed: int = 1234
    """Seed of the initial weights. The data order has its own, `data.seed`."""
    global_rows: PositiveInt = 8
    """Rows in one optimizer step, over all ranks. Independent of the layout, so is the training."""
    microbatch_rows: PositiveInt = 8
    """Rows one rank runs at once; `global_rows` = microbatch_rows x data-parallel size x accumulation."""
    deterministic: bool = True
    """Use deterministic algorithms, so that a resumed run repeats the same bits. On a GPU this costs some speed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    threads: Count = 0
    """CPU threads of a process; 0 shares the machine's cores among the processes on it."""
    stop_after_steps: PositiveInt | None = None
    """Stop (with a checkpoint) after this many steps of this process; null runs to `steps`. For time-sliced machines."""
    start_from: str | None = None
    """Checkpoint (or run folder: its newest) whose weights a new run begins with; optimizer, step and data start anew. A
    pruned model is trained on this way. Read only while the run has no checkpoint of its own."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model. Sizes are whole-model sizes; ranks get their share."""

    pattern: str
    """One character a layer: `M` Mamba-2, `*` attention, `w` attention over a window, `-` MLP. `|` may fix where pipeline
    stages are cut. A transformer block is two characters: Gemma 2 (arXiv 2408.00118) is `w-*-` again and again."""
    hidden: PositiveInt
    """Width of the residual stream."""
    vocab: PositiveInt
    """Vocabulary size; must equal the tokenizer's and divide by `parallel.tensor`."""
    ffn: PositiveInt = 1024
    """Inner width of an MLP layer (per branch where gated)."""
    activation: Literal["squared_relu", "swiglu", "geglu", "gelu", "silu"] = "squared_relu"
    """MLP nonlinearity; `swiglu` and `geglu` are gated. Nemotron-H uses squared ReLU (arXiv 2504.03624)."""
    heads: PositiveInt = 4
    """Query heads of an attention layer."""
    kv_heads: PositiveInt = 4
    """Key/value heads; fewer than `heads` is grouped-query attention. Must divide `heads`."""
    head_dim: PositiveInt = 64
    """Width of one attention head; heads x head_dim need not equal `hidden` (Nemotron Nano 9B-v2: 40 x 128 on 4,480)."""
    query_scale: PositiveFloat | None = None
    """Attention scores are divided by the square root of this; null is `head_dim`. Gemma 2 27B: 144 (hidden / heads)."""
    window_tokens: PositiveInt = 4096
    """Tokens a `w` layer sees: the query's own and those before it. Gemma 2 (arXiv 2408.00118): 4,096."""
    attention_softcap: SoftCap | None = None
    """Attention scores s become c tanh(s / c) before mask and softmax; null leaves them. At most 70: kernels add up exponentials
    without taking out the largest. Gemma 2: 50."""
    mamba_heads: PositiveInt = 8
    """Heads of a Mamba-2 layer; inner width = mamba_heads x mamba_head_dim."""
    mamba_head_dim: PositiveInt = 64
    """Channels of one Mamba-2 head."""
    mamba_state: PositiveInt = 64
    """State size N of a Mamba-2 head."""
    mamba_groups: PositiveInt = 1
    """Groups of heads that share B and C. Must divide `mamba_heads` and be divisible by `parallel.tensor`."""
    mamba_conv: PositiveInt = 4
    """Taps of the causal convolution before the scan."""
    mamba_chunk: PositiveInt = 64
    """Chunk of the scan, in tokens: changes speed and rounding, not the function computed."""
    position: Literal["none", "rope"] = "none"
    """Positional embedding of attention layers. Hybrids need none: the Mamba layers carry order."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary angles, where `position` is `rope`."""
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"
    """How angles change for rows longer than those the model was trained on: `linear` divides them all by `rope_factor`
    (arXiv 2306.15595), `yarn` only the slow ones, and sharpens the softmax (arXiv 2309.00071), `llama3` only the slow ones
    (arXiv 2407.21783)."""
    rope_factor: PositiveFloat = 1.0
    """`rope_scaling`: how many times longer rows become."""
    rope_original_tokens: PositiveInt = 8192
    """`yarn`, `llama3`: row length the model was trained on before the scaling."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    norm_offset: Literal[0, 1] = 0
    """RMSNorm multiplies by this plus its weight: 1 (Gemma 2) has weights start at zero. Not the gated norm of Mamba-2."""
    post_norms: bool = False
    """Also norm what a layer gives, before it is added to the residual stream (Gemma 2)."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(hidden), rounded to the format of activations (Gemma 2)."""
    tie_embeddings: bool = False
    """Use the embedding matrix as output head too."""
    logit_softcap: SoftCap | None = None
    """Logits z become c tanh(z / c) before the softmax; null leaves them. Gemma 2: 30."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it divided by
    sqrt(number of layers)."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel degree is what is left of the world."""

    tensor: PositiveInt = 1
    """Ranks that share each matrix."""
    pipeline: PositiveInt = 1
    """Stages the layers are cut into."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per stage (interleaved schedule); 1 is the plain schedule."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor ranks along the sequence. Needs tensor > 1."""
    recompute: Literal["none", "full"] = "none"
    """`full` keeps only layer inputs and recomputes the rest in the backward pass: less memory, about 1/3 more work."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs. Needs overlap_grad_reduce."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats, and who multiplies."""

    params: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and activations. Masters, moments and gradient sums are always fp32; so are A_log, D, dt_bias."""
    backend: Literal["auto", "reference", "emulated", "te"] = "auto"
    """`te`: Transformer Engine modules and mamba-ssm kernels on a GPU; `reference`: plain torch on any device, high
    precision only; `emulated`: `reference` with the low-precision numbers computed exactly, on any device; `auto`: `te`
    where a GPU and both packages are there, else `emulated` if `scaling` asks for low precision, else `reference`."""
    scaling: Literal["none", "delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled"] = "none"
    """Low-precision recipe of the linear layers' GEMMs (docs/fp8.md). `none`: all in `params`. `delayed`: one scale a
    tensor, from earlier steps. `current`: one scale a tensor, from the tensor. `blockwise`: 1x128 and 128x128 blocks
    (Nemotron Nano 2, DeepSeek-V3). `mxfp8`: 1x32 blocks. `nvfp4`: 4 bits, 1x16 blocks. `unscaled`: FP8 without scales, an
    example of what goes wrong; `emulated` only."""
    power_of_two_scales: bool = True
    """`blockwise`: round scales down to powers of two; false keeps them fp32."""
    amax_history: PositiveInt = 1024
    """`delayed`: steps whose largest magnitudes a scale looks back on."""
    amax_from: Literal["max", "most_recent"] = "max"
    """`delayed`: the scale follows the largest of the history, or its last entry."""
    high_precision_first: Count = 0
    """Layers at the start of the pattern that stay in `params` precision."""
    high_precision_last: Count = 0
    """Layers at the end of the pattern that stay in `params` precision (Nemotron Nano 2: two at each end)."""
    switch_at_tokens: Count | None = None
    """From the first step at or after this many tokens on, use `scaling_after`; null never switches."""
    scaling_after: Literal["none", "delayed", "current", "blockwise", "mxfp8", "nvfp4", "unscaled"] = "none"
    """Scaling after the switch: `none` ends training in high precision."""
    fp8_weights: bool = False
    """`te`: keep weights in FP8 between steps and gather them in FP8 over data-parallel ranks."""
    health: bool = True
    """Measure quantisation errors at the logging interval (`emulated`): precision.jsonl in the run's folder."""
    health_policy: Literal["warn", "high_precision"] = "warn"
    """When an operand's signal-to-noise ratio leaves its band: say so, or also move that linear layer to high precision for
    the rest of the run."""
    health_floor_db: PositiveFloat | None = None
    """Lower end of the band, in dB; null takes the format's own: E4M3 20, E5M2 15, E2M1 10."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model is trained to do: predict the next token, or agree with a teacher (docs/compress.md)."""

    kind: Literal["next_token", "distill"] = "next_token"
    """`next_token`: cross-entropy of the labels. `distill`: agree with a teacher's whole distribution (Gemma 2,
    arXiv 2408.00118; Minitron, arXiv 2407.14679); the other fields of this group are for it."""
    teacher: str | None = None
    """The teacher: a checkpoint folder, or a run folder (its newest checkpoint). Any pattern, size and family with the
    student's vocabulary and tokenizer."""
    teacher_tensor: Count = 0
    """Ranks that share each of the teacher's matrices, whatever the student's layout; 0 takes `parallel.tensor`."""
    teacher_params: Literal["as_student", "fp32", "bf16"] = "as_student"
    """Format of the teacher's weights and activations."""
    teacher_scaling: Literal["none", "current", "blockwise", "mxfp8", "nvfp4"] = "none"
    """Low-precision recipe of the teacher's linear layers (docs/fp8.md)."""
    teacher_cache: str | None = None
    """Folder written by `python -m train.teacher_cache`: read the teacher's most likely tokens from there instead of
    running it."""
    trust_tokenizer: bool = False
    """Accept a teacher whose checkpoint does not say which tokenizer it was trained with (one that says so and differs is
    always refused)."""
    top_k: Count = 0
    """Use only the teacher's k most likely tokens and the mass of all others together; 0 uses the whole distribution.
    Lowers the loss reported by what the teacher and student disagree on within the rest."""
    divergence: Literal["kl", "cross_entropy"] = "kl"
    """`kl`: KL(teacher || student), 0 where they agree. `cross_entropy`: that plus the teacher's entropy, as Gemma 2
    writes it. Their gradients are the same."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the divergence is multiplied by its square (arXiv 1503.02531). Minitron found 1 best."""
    distill_weight: NonNegativeFloat = 1.0
    """Weight of the divergence."""
    next_token_weight: NonNegativeFloat = 0.0
    """Weight of the labels' cross-entropy. Minitron found the divergence alone best."""
    hidden_match: Literal["none", "cosine", "mse"] = "none"
    """Also match hidden states: `cosine` distance, or squared error over the teacher's mean square. Needs teacher and
    student of one width, or a pruned student (its kept channels are compared). Minitron: for large cuts in depth."""
    hidden_layers: str = "final"
    """Which: `final` (after the final norm), or pairs student:teacher of layer numbers from 0, e.g. `3:5,7:11`. Under
    pipeline parallelism the student's layers must be on the last stage."""
    hidden_weight: NonNegativeFloat | None = None
    """Weight of the hidden-state match; null weighs each row so that it counts as much as the divergence (Minitron's
    alpha = L_logits / L_hidden)."""
    chunk_tokens: Count = 0
    """Tokens whose logits exist at a time; 0 chooses by the device and the vocabulary."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) with fp32 masters, sharded over the data-parallel ranks."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate; the schedule multiplies it."""
    beta1: OpenFraction = 0.9
    """Decay of the first moment."""
    beta2: OpenFraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay. Norm weights, biases, A_log, D and dt_bias are never decayed."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm is scaled down to this; 0 turns clipping off."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over time, as a factor of `optim.lr`."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """`wsd`: warm-up, stable, decay; `cosine`: warm-up, half a cosine; `constant`: warm-up, then 1."""
    unit: Literal["steps", "tokens"] = "steps"
    """Unit of `warmup`, `decay` and `total`."""
    warmup: Count = 0
    """Linear rise from 0 over this long."""
    decay: Count = 0
    """`wsd` only: length of the decay at the end."""
    total: PositiveInt | None = None
    """Where the decay ends; null is the end of the run (`run.steps`)."""
    final_fraction: Fraction = 0.01
    """Factor at the end of the decay (Nemotron Nano 2: 4.5e-6 / 4.5e-4 = 0.01)."""
    decay_shape: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "minus_sqrt"
    """Shape of the `wsd` decay: with t from 0 to 1, `minus_sqrt` is 1 - sqrt(t) (arXiv 2405.18392)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: Count = 100
    """Save at every multiple of this step; 0 saves at the end only."""
    keep_last: PositiveInt = 2
    """Checkpoints kept, newest first. Older ones are deleted when the next is durable, never before."""
    keep_every_steps: Count = 0
    """Also keep every checkpoint at a multiple of this step for good; 0 keeps none."""
    background: bool = True
    """Write while training goes on, from a copy in host memory (as big as this rank's part of the checkpoint); false waits
    for the disk at each save."""
    retries: Count = 2
    """Times a failed save is tried again from the same copy."""
    retry_wait_s: NonNegativeFloat = 5.0
    """Seconds before the first retry; doubled for each further one."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a save has failed for good: end the run with an error at the next step, or warn and go on to the next save."""
    resume: Literal["auto", "never", "required"] = "auto"
    """`auto` continues where the run's folder left off; `never` refuses a folder that already holds checkpoints;
    `required` refuses one that holds none."""
    allow: tuple[Literal["data_order", "arithmetic"], ...] = ()
    """Kinds of recipe changes that a resume may bring: `data_order` (other rows from here on), `arithmetic` (other numbers
    from the same rows, e.g. optim.lr). Changes that are safe need no word."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation during training."""

    every_steps: Count = 100
    """Evaluate at every multiple of this step, and at the start and end; 0 evaluates at the start and end only."""
    rows_per_source: PositiveInt = 32
    """Held-out rows of each source that are scored (all of them where there are fewer)."""


@dataclass(frozen=True)
class TelemetryConfig:
    """What is shown and recorded."""

    log_every_steps: PositiveInt = 10
    """Steps between reductions of the metrics over ranks; every step of the interval is still recorded."""
    progress: bool = True
    """Live progress bar (a plain line per interval where the output is not a terminal)."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `offline` needs no network (`wandb sync` sends it later). Never stops a run."""
    wandb_project: str = "stratum"
    """Project name at Weights & Biases."""


@dataclass(frozen=True)
class SlurmConfig:
    """What `python -m launch slurm` asks a cluster for, and how a run goes on when a job's time is up."""

    partition: str | None = None
    """Partition of the jobs; null takes the cluster's default."""
    account: str | None = None
    """Account that pays; null takes yours."""
    qos: str | None = None
    """Quality of service; null takes the default."""
    time_limit_minutes: PositiveInt = 240
    """Time limit of one job. A run takes as many jobs as it needs."""
    save_before_end_s: PositiveInt = 300
    """SIGUSR1 reaches the processes this long before the time limit (Slurm: up to 60 s earlier): they save and stop. Must
    cover the longest step and a save."""
    continuation: Literal["requeue", "chain", "none"] = "requeue"
    """Until the last step: `requeue` puts the same job back into the queue; `chain` keeps the next job waiting behind the
    running one, which also survives the loss of its first node where the cluster does not requeue; `none` stops."""
    cpus_per_process: Count = 0
    """CPUs of each process, for its threads; 0 leaves it to the cluster."""
    memory_gib: Count = 0
    """Memory of each node; 0 leaves it to the cluster."""
    options: str = ""
    """More sbatch options, as on its command line: `--exclusive --constraint=ib`."""
    setup: str = ""
    """Shell lines run on the first node before the processes start: `module load cuda`."""


@dataclass(frozen=True)
class ContainerConfig:
    """Where the processes of a Slurm job find their software. The present folder is mounted at its own path."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """`pyxis`: srun starts the processes in an enroot image; `apptainer`: by `apptainer exec`; `none`: on the bare node."""
    image: str = ""
    """Image: a `.sqsh` file or `registry#name:tag` for pyxis, a `.sif` file or `docker://name:tag` for apptainer."""
    mounts: str = ""
    """More folders, separated by commas: `HOST:INSIDE,...`."""
    python: str = "python"
    """Python inside the image."""


@dataclass(frozen=True)
class LaunchConfig:
    """How processes are started, find each other, and are started again."""

    nodes: PositiveInt = 1
    """Machines (`launch slurm`)."""
    processes: PositiveInt | None = None
    """Processes on each machine; null takes one a GPU, or without GPUs as many as tensor x pipeline x context need."""
    gpus_per_node: Count = 0
    """GPUs asked for on each node (`launch slurm`); 0 asks for none."""
    timeout_s: PositiveFloat = 600.0
    """Collective operations that take longer fail, instead of hanging for ever."""
    restarts: Count = 3
    """Restarts after failures in a row that brought no new checkpoint; then the run gives up. Mistakes in the recipe or
    the data are never tried again."""
    backoff_s: PositiveFloat = 10.0
    """Wait before the first restart (`launch local`), doubled each time in a row, at most 5 minutes."""
    grace_s: PositiveFloat = 600.0
    """Time to finish the step and save after a signal; what still runs then is killed. Must cover the longest of both."""
    environment: str = ""
    """More environment variables of the processes: `NCCL_DEBUG=INFO NCCL_IB_HCA=mlx5`."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Slurm jobs."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Containers of Slurm jobs."""


@dataclass(frozen=True)
class CompressConfig:
    """Scoring, pruning and searching (`python -m train.compress`, docs/compress.md); training does not read it."""

    parent: str | None = None
    """The model to compress: a checkpoint folder, or a run folder (its newest checkpoint)."""
    folder: str = "runs/compress"
    """Scores, pictures and pruned checkpoints lie in `folder`/`run.name`."""
    calibration_rows: PositiveInt = 1024
    """Training rows, from position 0, over which widths and block influence are scored (Minitron: 1,024)."""
    depth_rows: PositiveInt = 128
    """Rows for the removal scores, which take one pass per layer and round (Nemotron-H: 128)."""
    depth_metric: Literal["logit_mse", "perplexity", "block_influence"] = "logit_mse"
    """What decides which layer goes next: squared error of the logits, rise of the next-token loss, or (without trying)
    1 - cos between a layer's input and output."""
    layers: Count = 0
    """Layers left after pruning; 0 keeps all."""
    attention_layers: Count | None = None
    """Attention layers among them; null leaves that to the scores. Nano 2's search fixed 4."""
    hidden: Count = 0
    """Width of the residual stream; 0 keeps it. So for the four below."""
    ffn: Count = 0
    """Inner width of MLP layers (per branch)."""
    heads: Count = 0
    """Query heads: an equal number of each key/value head's. Key/value heads stay."""
    merge_heads: bool = False
    """Add to the weakest query heads kept what separates them from the strongest dropped (Minitron, arXiv 2407.14679, section
    2.3)."""
    mamba_heads: Count = 0
    """Mamba-2 heads: an equal number of each group. Groups and state size stay."""
    mamba_head_dim: Count = 0
    """Channels of a Mamba-2 head, the same in all heads of a layer."""
    search_layers: str = ""
    """Sizes to try, as [52,54,56] or first:last:step; empty tries the size above only. So for the four below."""
    search_hidden: str = ""
    """Widths of the residual stream to try."""
    search_ffn: str = ""
    """MLP widths to try."""
    search_heads: str = ""
    """Query heads to try."""
    search_mamba_heads: str = ""
    """Mamba-2 heads to try."""
    budget_parameters: Count = 0
    """Parameters, met within `budget_tolerance`; 0: no such limit."""
    budget_tolerance: Fraction = 0.05
    """Relative distance from `budget_parameters` allowed (Minitron: 5 %)."""
    budget_gib: NonNegativeFloat = 0.0
    """Memory for weights, key/value cache and Mamba states in 16 bits, GiB; 0: no limit. Nano 2: 19.66."""
    budget_context_tokens: PositiveInt = 131072
    """Tokens of context that memory must hold, for each row of the batch."""
    budget_batch: PositiveInt = 1
    """Rows generated at once."""
    budget_tokens_per_s: NonNegativeFloat = 0.0
    """Least generation speed by the roofline of the device below; 0: no limit."""
    device_gb_per_s: PositiveFloat = 600.0
    """Memory bandwidth of the device the model is for. A10G: 600 (NVIDIA data sheet)."""
    device_tflops: PositiveFloat = 70.0
    """Its dense bf16 peak. A10G: 70."""
    candidates: PositiveInt = 3
    """Best candidates that are pruned and get a short distillation each (Nano 2: 3)."""


@dataclass(frozen=True)
class Recipe:
    """A whole run. Groups can be swapped on the command line (`precision=bf16`), fields overridden (`optim.lr=3e-4`)."""

    run: RunConfig
    """Name, length and size of a step."""
    model: ModelConfig
    """Shape of the model."""
    data: DataConfig
    """Where the tokens come from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats and backend."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the model is trained to do."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, what to keep."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Held-out evaluation."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Progress, metrics files, Weights & Biases."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes, machines, Slurm."""
