"""Compression of a network while it learns: compactors, masks, budgets, folding, surgery, and the baselines.

The terms of Xie et al. ("Towards a Smaller Student", CVPR 2023) and where they are found here:

- channel importance indicator: `Compactor` and `ChannelGate` in pipeline/models/resnet.py;
- distillation in a student with dynamic capacity: `student`;
- retrieval-guided gradient resetting: `paper` as published; `importance`, `masks` and `shrinker` with a budget;
- group lasso on the rows of the compactors: `paper`; method `budget` replaces it by a proximal step in `compactor`;
- merging compactors into convolutions (from ResRep, Ding et al., ICCV 2021): `fold`, `surgery`, `live_shrinking`.
"""
