"""Writes golden.json beside it: tiny checkpoints of every family, and what transformers makes of
them. The tests need neither this file nor transformers.

    python tests/hub/make_golden.py        needs torch and transformers

A weight's values follow from its name, so that the file holds names and shapes alone.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import CONFIGS, IDS, TARGETS, values


def golden(name: str) -> dict:
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    kind = getattr(transformers, CONFIGS[name]["architectures"][0])
    model = kind(config).eval()
    if not CONFIGS[name].get("tie_word_embeddings", True):
        # A new T5 of version 5 is always tied, whatever it would be when it is read.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    own = dict(model.state_dict())
    # Of weights that share their memory the first one is kept, as in a file.
    kept, seen = {}, set()
    for key, tensor in own.items():
        if tensor.data_ptr() not in seen and "embed_positions" not in key:
            kept[key] = list(tensor.shape)
            seen.add(tensor.data_ptr())
    for key, shape in kept.items():
        own[key].copy_(torch.from_numpy(values(key, shape)))
    ids = torch.tensor([IDS])
    inputs = dict(input_ids=ids)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([TARGETS])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return dict(tensors=kept, logits=[[round(x, 6) for x in row] for row in logits.tolist()])


def main() -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(golden(name))}" for name in CONFIGS]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(__file__).with_name("golden.json").write_text(text)
    print(transformers.__version__, torch.__version__, len(text), "bytes")


if __name__ == "__main__":
    main()
