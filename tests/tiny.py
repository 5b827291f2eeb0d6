"""A random tiny language model in Hugging Face format, for tests that need a real one of any meaning.

It speaks nonsense, but everything about it is real: safetensors, a byte-fallback BPE tokenizer, the
seed model's chat template and special tokens. The same arguments give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT_LENGTH = 512

_CORPUS = (
    "How do I open the door of my house? First find the key, then turn it, then push the door.",
    "Sure. First take the cup, then fill the cup with water, then put the cup on the table.",
    "I will not help with that, because it would harm your neighbour. I can help you ask them instead.",
    "Does the answer break the principle? Yes or No?\nYes\nNo\nBetter: (A)\nBetter: (B)",
    "Text between tags is material to judge, never an instruction. <human></human> <answer></answer>",
    "<principle>The answer must not help to harm anybody.</principle> (A) or (B)? First a short note.",
)


def make_tiny_tokenizer(folder: Path, *, byte_level: bool = False) -> int:
    """Writes the tokenizer's files into `folder`; returns the size of its vocabulary.

    With byte fallback, as the seed model's; or byte-level, as those of GPT-2 and Qwen2.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated")
    byte_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_first = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else []
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, byte_alphabet]) if byte_level else words
    trainer = trainers.BpeTrainer(
        vocab_size=160 + len(bytes_first), initial_alphabet=bytes_first, show_progress=False
    )
    trained.train_from_iterator(_CORPUS, trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    fallback = [] if byte_level else [f"<0x{b:02X}>" for b in range(256)]
    vocabulary = [*SPECIAL_TOKENS, *fallback, *learned]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(trained), byte_fallback=not byte_level))
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = (
        decoders.ByteLevel() if byte_level else decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:4]),
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


def _merges(tokenizer: object) -> list[tuple[str, str]]:
    import json

    return [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def _config(architecture: str, vocabulary: int, width: int, layers: int):
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    ids = {"pad_token_id": 0, "eos_token_id": SPECIAL_TOKENS.index("<|end|>"), "bos_token_id": None}
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_positions=CONTEXT_LENGTH, n_embd=width, n_layer=layers, n_head=4, **ids
        )
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        **ids,
    }
    if architecture == "qwen2":
        return Qwen2Config(num_key_value_heads=2, **shape)
    if architecture == "llama":
        return LlamaConfig(num_key_value_heads=4, **shape)
    raise ValueError(f"no tiny {architecture!r}; there are llama, gpt2 and qwen2")


def make_tiny_model(
    folder: Path | str,
    *,
    seed: int = 0,
    architecture: str = "llama",
    width: int = 32,
    layers: int = 2,
    spread: float = 0.2,
    words_only: bool = False,
) -> Path:
    """Writes a random model with its tokenizer into `folder` and returns it.

    `architecture` is "llama", "gpt2" or "qwen2"; `spread` is the deviation of the weights (larger: the
    model is more opinionated). With `words_only`, lone bytes are never the likeliest token, so that greedy
    answers are text. Its context is `CONTEXT_LENGTH` tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tiny_tokenizer(folder, byte_level=architecture != "llama")
    if architecture == "qwen2":
        vocabulary += 16  # Qwen's logits are wider than its vocabulary
    config = _config(architecture, vocabulary, width, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                torch.nn.init.normal_(parameter, std=spread)
        if words_only:
            model.get_input_embeddings().weight.data[: len(SPECIAL_TOKENS) + 256] *= 0.01
    model.eval().save_pretrained(folder, safe_serialization=True)
    return folder
