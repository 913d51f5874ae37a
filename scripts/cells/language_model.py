# %% [markdown]
# # A language model, explained
#
# A small GPT reads Python's own documentation. Which passages made it expect a sentence, and which of their tokens?
# The model and its tokenizer are trained here, on this machine: nothing is downloaded.

# %%
passages, seconds, width, depth, vocabulary = 2000, 60, 192, 2, 2048  # sizes

# %% [markdown]
# ## A model and its texts
#
# Passages of the standard library's `pydoc_data.topics`, and what `lorif demo` trains on them. With your own model,
# `load_text_model("folder")` and `read_documents` stand in the place of this cell.

# %%
from pathlib import Path

import torch

from lorif_index.text import TextModel, build_text_index
from lorif_index.text.demo_model import DemoSettings, documentation, new_model, train, train_tokenizer

torch.manual_seed(0)
settings = DemoSettings(seconds=seconds, width=width, depth=depth, vocabulary=vocabulary)
documents = documentation(settings.characters)[:passages]
tokenizer = train_tokenizer(documents, settings.vocabulary)
text_model = TextModel(Path("model"), new_model(settings, len(tokenizer)), tokenizer)
texts = text_model.passages(documents, progress=False)
train(text_model, texts, texts, settings, progress=False)
text_model.model.save_pretrained("model")
tokenizer.save_pretrained("model")
print(f"{len(documents):,} passages, {texts.tokens:,} tokens, {text_model.model.num_parameters():,} parameters")

# %% [markdown]
# ## The index
#
# It keeps the passages and where the model is, so that it can be asked in words. From the command line this is
# `lorif build index --model model --data texts.jsonl`.

# %%
index = build_text_index(Path("index"), text_model, documents, max_length=settings.context, progress=False)
print(index)

# %% [markdown]
# ## Ask

# %%
question = 'The context manager\'s "__exit__()" method is called when the "with" block is left.'
hits = index.search(question, 5)
for score, payload in zip(hits.scores[0], hits.payloads[0], strict=True):
    print(f"{score:8.1f}  {payload['source']:14}  {' '.join(payload['text'].split())[:80]}")

# %% [markdown]
# ## Which tokens?
#
# A score is a sum over the tokens of the passage, exactly. A token's share is that of what the model predicted from it.

# %%
e = index.explain(question, hits)[0][0]
(words,) = text_model.token_texts(hits.payloads[0][:1])
print(f"score {e.score:.1f}, of the stored row {e.stored:.1f}; the shares add up to {e.tokens.sum():.1f}")
strongest = sorted(zip(e.tokens, words), reverse=True)[:10]
for share, token in strongest:
    print(f"{share / e.score:+7.1%}  {token!r}")

# %%
import matplotlib.pyplot as plt

figure, (tokens, layers) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[2, 1])
tokens.bar(range(len(e.tokens)), e.tokens)
tokens.set(xlabel="token of the passage", ylabel="share of the score")
layers.barh([name.removeprefix("transformer.") for name in e.layers], list(e.layers.values()))
layers.set(xlabel="share by layer")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Which topics?
#
# Scores of the whole training set, summed by the page that a passage is from.

# %%
index.groups(question, by="source", k=8)

# %% [markdown]
# ## What does the index see?
#
# Shares of the squared gradient norm: in the tracked layers, in their projections, in the stored rows.

# %%
{name: share for name, share in index.build_report["coverage"].items() if isinstance(share, float)}
