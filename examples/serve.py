"""Serves a saved model over HTTP: python examples/serve.py FOLDER, and any options of `transformers serve`.

`transformers serve --trust-remote-code` runs the code in the folder for the configuration, but then looks for the
model among Transformers' own classes, by the name in `architectures` (5.17 to 5.23, cli/serving/model_manager.py).
This puts the folder's class there first. The folder needs a tokenizer, and a chat template for /v1/chat/completions
alone. Run it with `pip install "transformers[serving]"`; hugging_nano_gpt is not used.
"""

import sys

import transformers
from transformers.cli.transformers import main
from transformers.dynamic_module_utils import get_class_from_dynamic_module

if __name__ == "__main__":
    folder = sys.argv[1]
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], folder)
    setattr(transformers, model_class.__name__, model_class)
    sys.argv = ["transformers", "serve", *sys.argv[1:], "--trust-remote-code"]
    main()
