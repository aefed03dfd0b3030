"""Tiny text encoders with random weights in folders of their own, as transformers saves them."""

from pathlib import Path

WORDS = ["the", "a", "digit", "left", "of", "one", "two", "three", "four", "seven", "nine"]
KINDS = ("bert", "clip", "t5")
WIDTH = 32
SIDE, TOKENS = 16, 8  # of a CLIP model: pixels of its pictures, tokens of its captions


def written(kind: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a text model of this kind and its tokenizer: the words of the digits, and marks around them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(seed)
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = "$A </s>" if kind == "t5" else "<s> $A </s>"  # T5 has no mark that begins
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 2), ("</s>", 3)])
    size = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    layers = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size, **layers))
    elif kind == "clip model":  # of both towers, with what its pictures go through
        seen = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        vision = seen | {"image_size": SIDE, "patch_size": 8}
        own = {"text_config": size | layers | {"max_position_embeddings": TOKENS}, "vision_config": vision}
        model = transformers.CLIPModel(transformers.CLIPConfig(**own, projection_dim=16))
        for one in model.parameters():  # so that captions and pictures differ
            one.data = one.data + 0.1 * torch.randn(one.shape)
        transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ).save_pretrained(folder)
    elif kind == "clip":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**size, **layers))
    else:
        shape = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = transformers.T5EncoderModel(transformers.T5Config(**size, **shape, decoder_start_token_id=0))
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder
