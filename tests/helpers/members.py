"""The members of the nanoGPT family: files that their own code wrote, in tests/fixtures."""

# What the user has to say about each file, and the activation and the tying that it should be read with.
MEMBERS = {
    "nanogpt-2022-12-28-fe804286/ckpt.pt": ({}, "gelu_new", False),
    "nanogpt-2023-01-14-43b37fd5/ckpt.pt": ({}, "gelu_new", True),
    "nanogpt-2023-01-27-2892858c/ckpt.pt": ({}, "gelu_new", True),
    "nanogpt-2023-01-27-e808a671/ckpt.pt": ({}, "gelu_new", True),
    "nanogpt-2023-02-02-1e87509e/ckpt.pt": ({}, "gelu_new", True),
    "nanogpt-2023-02-05-ab0718a7/ckpt.pt": ({}, "gelu_new", True),
    # six weeks in which nothing in the file shows the GELU
    "nanogpt-2023-05-06-7fe4a099/ckpt.pt": ({"activation_function": "gelu_new"}, "gelu_new", True),
    "nanogpt-2023-06-14-f08abb45/ckpt.pt": ({}, "gelu", True),
    "nanogpt-head-compiled/ckpt.pt": ({}, "gelu", True),
    "nanogpt-head-nobias/ckpt.pt": ({}, "gelu", True),
    "build-nanogpt/model_05000.pt": ({}, "gelu_pytorch_tanh", True),
    "mingpt/model.pt": ({"n_head": 4}, "gelu_new", False),
    "llmc/gpt2_tiny.bin": ({}, "gelu_new", True),
}
