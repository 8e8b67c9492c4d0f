"""Eight documented losses, built line by line: five forecasters, and three ways to fine-tune a language model.

>>> import mini_impl
>>> series = mini_impl.load_auckland()     # people an hour at seven places; load_csv(FILE) reads one of your own
>>> train, validation, test, scaler = mini_impl.prepare(series, (2400, 400, 400), history=48, horizon=24)
>>> model = mini_impl.DLinear(history=48, horizon=24)
>>> loss = mini_impl.forecasting.dlinear.documented_loss
>>> training = mini_impl.fit(model, train, validation, loss, epochs=2, progress=False)
>>> mini_impl.evaluate(model, test).mse < 0.7     # of z-scores: to say the mean all the time costs about 1
True

mini_impl.forecasting   DLinear, PatchTST, ITransformer, TimesNet, TimeXer; data, baselines, `fit`, `evaluate`
mini_impl.finetuning    LanguageModel, `generate`, `add_lora`; `fine_tune` with METHODS of SFT, GRPO and DAPO
    The module of each of the eight, such as forecasting.dlinear or finetuning.grpo, has its `documented_loss`,
    as the book's text has it, and its `published_loss`, as the paper or its public code has it.
mini_impl.results       `load(NAME)`: the figures of trainings that are too long for a page
mini_impl.plots         figures and sliders, with words in the language of the page

The same from a shell: mini-impl forecast MODEL, mini-impl finetune METHOD; each has --help.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mini_impl")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0 (not installed)"

from mini_impl import finetuning, forecasting, results
from mini_impl.finetuning import LanguageModel, add_lora, fine_tune, generate
from mini_impl.forecasting import DLinear, ITransformer, PatchTST, TimesNet, TimeXer
from mini_impl.forecasting import evaluate, fit, forecast, load, load_auckland, load_csv, prepare, save_csv

__all__ = ["finetuning", "forecasting", "results"]  # what `help` lists; the names above are shown by their own wing
