"""Display names of the parts of a step's time and of a rank's memory, for tables and pictures."""

PART_NAMES = {
    "mamba": "Mamba-2 products", "scan": "Mamba-2 scan", "attention": "attention products", "scores": "attention scores",
    "mlp": "MLP products", "experts": "expert products", "exchange": "exchange with experts",
    "head": "head products", "elementwise": "norms, activations, loss", "quantise": "quantising",
    "recompute": "recomputing", "launch": "between kernels", "tensor": "tensor parallel, exposed",
    "context": "context parallel, exposed", "pipeline": "messages of stages", "bubble": "pipeline bubble", "teacher": "teacher",
    "uneven": "uneven stages", "data": "data parallel, exposed", "optimizer": "optimizer", "jitter": "stragglers",
}  # fmt: skip
"""Parts of a step's time."""

MEMORY_NAMES = {
    "weights": "weights", "gradients": "grads", "masters": "masters", "moments": "moments", "low_copies": "FP8",
    "activations": "activations", "workspace": "temporary", "communication": "messages", "teacher": "frozen",
    "answers": "answers", "reserve": "reserve",
}  # fmt: skip
