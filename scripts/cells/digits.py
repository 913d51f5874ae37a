# %% [markdown]
# # Mislabelled digits
#
# An image classifier is trained on handwritten digits of which one in ten has a wrong label. Can an index of its
# training gradients say which? And which training images made it get a test image wrong?

# %%
examples, flips, steps = 1500, 150, 150  # sizes

# %% [markdown]
# ## A model and its data

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from lorif_index import Index

torch.manual_seed(0)
x, truth = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x = x.float().reshape(-1, 1, 8, 8) / 16
y = truth.clone()
flipped = torch.randperm(examples)[:flips]
y[flipped] = (y[flipped] + torch.randint(1, 10, (flips,))) % 10

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(steps):
    optimizer.zero_grad()
    cross_entropy(model(x[:examples]), y[:examples]).backward()
    optimizer.step()
right = (model(x[examples:]).argmax(1) == truth[examples:]).float().mean()
print(f"right on held-out images: {right:.1%}")

# %% [markdown]
# ## The index

# %%
notes = [{"label": int(label), "flipped": i in set(flipped.tolist())} for i, label in enumerate(y[:examples])]
index = Index.build("runs/digits", model=model, data=(x[:examples], y[:examples]), payloads=notes, progress=False)
print(index)

# %% [markdown]
# ## Which labels are wrong?
#
# An example that agrees with no other has to be learnt by heart: its score with itself is large.

# %%
suspects = index.ids[np.argsort(-index.self_influence())]
found = np.isin(suspects[:flips], flipped.numpy())
chance = flips * flips // examples
print(f"of the {flips} most suspicious, {found.sum()} have a flipped label; by chance {chance}")
loss = cross_entropy(model(x[:examples]), y[:examples], reduction="none").detach().numpy()
print(f"by the plain loss: {np.isin(np.argsort(-loss)[:flips], flipped.numpy()).sum()}")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, 8, figsize=(8, 2.6))
for axis, one in zip(axes.flat, suspects[:16]):
    axis.imshow(x[one, 0], cmap="gray_r")
    axis.set_title(f"{int(y[one])} (a {int(truth[one])})", fontsize=9)
    axis.axis("off")
figure.suptitle("most suspicious: label (what it is)", fontsize=10)
plt.show()

# %% [markdown]
# ## Why is this one wrong?
#
# A held-out image that the model gets wrong, and the training images that made it say what it says: the question is the
# image with the model's own answer as its label.

# %%
said = model(x[examples:]).argmax(1)
wrong = examples + int((said != truth[examples:]).nonzero()[0])
answer = said[wrong - examples : wrong - examples + 1]
print(f"image {wrong} is a {int(truth[wrong])}; the model says {int(answer)}")
hits = index.search((x[wrong : wrong + 1], answer), k=6)
hits

# %%
figure, axes = plt.subplots(1, 7, figsize=(8, 1.6))
for axis, one, title in zip(axes, [wrong, *hits.ids[0]], ["asked"] + [f"labelled {int(y[i])}" for i in hits.ids[0]]):
    axis.imshow(x[int(one), 0], cmap="gray_r")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Do the flips harm?
#
# The scores of all training examples, summed over held-out questions by whether their label is flipped. Negative:
# without them the loss would be lower.

# %%
questions = (x[examples : examples + 100], truth[examples : examples + 100])
for value in (False, True):
    sums = [group.sum for groups in index.groups(questions, by="flipped") for group in groups if group.value is value]
    print(f"flipped {value}: {np.sum(sums) / len(index) / len(questions[0]):+.3f} nats a question, as estimated")
