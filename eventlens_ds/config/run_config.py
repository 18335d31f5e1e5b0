"""RunConfig: every setting of a run, with its unit, default and interplay under each field.

In: recipe YAML and dotted overrides (config/load.py). Out: one frozen tree of dataclasses that is written to
RUN/config.yaml. Decision: a value has one home. Batch, learning rate, dtype and clipping live here; ZeRO and
communication knobs live in ds_configs/*.json, and config/deepspeed.py refuses duplicates and "auto".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RoIConfig:
    source: Literal["tower", "aggregator"] = "tower"
    """What regions are pooled from: levels of the vision tower, or the aggregator's output."""
    output_size: int = 7
    """Bins per side of RoI-align; 7 as in VL-BERT and r2c."""
    sampling_ratio: int = 2
    """Samples per bin and axis. Adaptive (-1) is a knife edge on 14-pixel patches and is not the default."""
    pool: Literal["mean", "flatten"] = "mean"
    """mean: average of the bins (rank-1 form). flatten: all bins through one linear layer, keeps the layout."""
    levels: tuple[int, ...] = ()
    """Hidden states of the vision tower to pool from; several are averaged. Empty: the level of the projector."""


@dataclass(frozen=True)
class AdapterConfig:
    bottleneck: int = 64
    """Width r of every adapter's bottleneck; 0 switches adapters off."""
    router: Literal["task", "mixture", "topk"] = "task"
    """task: every task of `tasks` has an adapter of its own. mixture: one adapter for image-level and one for
    region-level tasks, mixed by a learned vector per adapter and level (LION). topk: every token takes `top_k` of
    `experts` adapters by what it is, whatever its task (Shazeer et al., 2017)."""
    experts: int = 4
    """Adapters of router topk."""
    top_k: int = 2
    """Adapters that a token takes under router topk; objective.load_balance keeps their use even."""
    renormalise: bool = True
    """Router topk: softmax over the selected adapters alone; false: over all, so the selected weigh less than 1."""
    tasks: tuple[str, ...] = ("caption", "event", "vcr_answer", "vcr_rationale")
    """Tasks with an adapter of their own under router task; a task of the data without one is refused."""
    source: Literal["normed", "residual"] = "normed"
    """What the adapter reads: the FFN's normalised input, or the un-normalised residual stream as in LION."""
    dropout: float = 0.0


@dataclass(frozen=True)
class AggregatorConfig:
    layers: tuple[int, ...] = ()
    """Blocks of the tower it reads, from 0: the first is refined, each further one costs a block (LION: 38, 28, 18).
    Empty: no aggregator."""
    heads: int = 0
    """Attention heads; 0: those of the tower."""
    intermediate: int = 3072
    """Width of its feed-forward layers."""


@dataclass(frozen=True)
class QFormerConfig:
    queries: int = 0
    """Learned queries, each a visual token of the prompt (LION: 32); 0: no Q-Former."""
    width: int = 768
    heads: int = 12
    layers: int = 12
    intermediate: int = 3072
    instruction_tokens: int = 128
    """Tokens of the question it reads, the last ones of a longer question; 0: none, and questions of an image may
    share their prefix."""
    tokenizer_path: str = ""
    """Folder of the BERT tokenizer that a published Q-Former reads questions with ([CLS] and [SEP] count among
    instruction_tokens); empty: the language model's tokenizer."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """0 switches LoRA off."""
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class ModelConfig:
    preset: str = "tiny"
    """tiny, small, tiny-t5 (everything from scratch) | base | vicuna7b-clipL336 | qwen-siglip | lion-flant5xl |
    lion-flant5xxl; see model/presets.py. Those with t5 encode the prompt and decode the answer."""
    vision_path: str = ""
    """Folder of a Hugging Face CLIP, SigLIP or InstructBLIP model; empty: the preset's shape, from scratch."""
    language_path: str = ""
    """Folder of a Hugging Face causal LM or T5; empty: the preset's shape, initialised from scratch."""
    tokenizer_path: str = ""
    """Folder of a tokenizer; empty: language_path, without one that built from the embedded grammar."""
    init_from: str = ""
    """LLaVA-1.5 HF folder whose tensors are mapped by name; unmatched are listed, unexpected are an error."""
    linking: Literal["add", "insert", "none"] = "add"
    """How a mention meets its region: add (+ e_i on every token of the mention), insert (one soft token after it)."""
    visual_pool: int = 0
    """Patches averaged per side into one visual token of the prompt (2: a quarter of the tokens); regions are always
    pooled from all patches. 0 takes the preset's."""
    image_size: int = 0
    """Pixels per side; 0 takes the preset's or the folder's."""
    qk_correlation: float = 0.0
    """Correlation of query and key weights in a language model that starts from random weights (mimetic initialization,
    Trockman and Kolter, 2023): with .7 small models learn to match in context in fewer steps. 0: independent."""
    word_spread: float = 0.0
    """Standard deviation of the word embeddings of a language model that starts from random weights; its output matrix
    is then one of its own. With 1 words are as large as visual tokens, and small models sooner find one among them.
    0: the preset's, tied to the output."""
    visual_positions: float = 0.0
    """Amplitude of a fixed sine-cosine code of row and column on the visual tokens of a grid (projector's or
    aggregator's), which are normalised first: a tower trained from scratch on what regions show hardly says where they
    are. 0: tokens as they are."""
    visual_input: Literal["projector", "aggregator", "qformer", "all"] = "projector"
    """Visual tokens of an image: patches of one level through the projector, the aggregator's grid, the Q-Former's
    queries, or queries and grid (LION). A branch that is present and not used here is frozen."""
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    soft_prompt: bool = False
    """List an image's tags in the prompt behind a learned vector that says how far to trust them (LION)."""
    roi: RoIConfig = field(default_factory=RoIConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: Literal["auto", "sdpa", "blocks", "varlen"] = "auto"
    """Form of the segment tree: sdpa (one 4-D mask), blocks (a mask per tree of the row), varlen (prefix keys
    gathered per branch). auto: varlen where a fused kernel runs it, else blocks. T5: sdpa, or blocks (each encoder and
    decoder sequence by itself, also auto)."""
    kernels: Literal["", "reference", "triton", "csrc"] = ""
    """Backend of RoI-align and of the adapters; empty: chosen per op and device, as `doctor` shows."""
    dropout: float = 0.0
    """Dropout of projector and region encoder; seeded by (seed, step, row)."""


@dataclass(frozen=True)
class EpisodeConfig:
    """Training episodes of Link-Context Learning (task lcl). They are drawn, not stored: nothing here needs a new
    `data build`."""

    strategy: Literal["2-way", "2-way-random", "2-way-weight"] = "2-way"
    """Law of the shots: always `shots`, uniform in min_shots .. shots, or p_j = e^j / sum e^m over the same range. The
    names are the paper's; [mix] is any of them with `share` 0.5."""
    shots: int = 16
    """Demonstrations of each of the two classes, so an episode has 2 * shots + 1 images."""
    min_shots: int = 2
    """Least shots of 2-way-random and 2-way-weight."""
    fixed_epochs: int = 0
    """Epochs with `shots` each before the law of the strategy begins; the paper trains [2-way] before the others."""
    per_epoch: int = 0
    """Episodes of an epoch, over the classes in turn; 0: one per class."""
    share: float = 0.0
    """Share of episodes among all groups, [mix] is 0.5: an epoch draws as many as that takes, none of them twice; the
    rest keeps data.weights. 0: by number."""
    neighbours: int = 100
    """Nearest classes that a hard negative is drawn from, p_j = (n + 1 - j) / sum m for rank j of n."""
    hard: float = 1.0
    """Chance that the negative class is a neighbour; else it is any other class."""
    random_labels: Literal["anchor", "both", "none"] = "anchor"
    """Classes that a random string names in place of their true name. The released code renames the anchor alone; with
    both, names cannot be learned by heart."""
    label_form: Literal["letters", "syllables"] = "letters"
    """A random string: 1 to 10 lowercase letters, or two syllables as embedded creatures are named."""
    form: Literal["released", "plain", "short", "chat"] = "released"
    """Words of an episode: the released conversation byte for byte, bare questions and answers, each image with its
    name alone, or turns of the tokenizer's own chat template."""
    queries: str = ""
    """JSON list of questions for the query image (the released ICL.json); empty: the one that evaluation asks."""
    objective: Literal["answer", "choice"] = "answer"
    """answer: LM loss on the answer to the query, as in the paper. choice: softmax over the answers with either name
    (objective.choice, objective.choice_lm)."""
    supervise: Literal["last", "all"] = "last"
    """last: the answer to the query, as in the paper. all: also the answer of every demonstration but the first of its
    class, whose name nothing before it says; several times the targets for the same tokens."""


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...] = ()
    """Folders made by `eventlens data build`."""
    weights: tuple[float, ...] = ()
    """Share of each folder in the mixture; empty: by its number of groups."""
    tasks: tuple[str, ...] = ()
    """Tasks used for training (records.TASKS); empty: all the folders hold."""
    split: str = "train"
    eval: str = ""
    """Folder evaluated during training; empty: the first of `train`."""
    eval_split: str = "val"
    limit: int = 0
    """Use only the first N images of each folder (0: all)."""
    list_objects: bool = True
    """Name the regions of an image in the prompt before the question; off saves tokens, mentions stay linked."""
    event_context: Literal["event", "subject"] = "event"
    """What intent, before and after are conditioned on beside the image: the text of event and place, as in
    VisualCOMET, or only the person, so that they must be read from the picture."""
    tag_tokens: int = 128
    """Tokens that an image's tags may take in the prompt (model.soft_prompt); the list is cut from its end."""
    tag_noise: float = 0.0
    """Share of the listed tags that training replaces by tags of other images, of as many tokens; drawn anew in every
    epoch. Never in an evaluation."""
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    control: Literal["none", "blank", "permute_regions", "blank_demos", "released_splice"] = "none"
    """Train on what a control shows (data/controls.py): blank is a model that never sees a pixel or a region,
    released_splice one that embeds the last image of an episode alone, as the released code of LCL does."""
    row_tokens: int = 1024
    """Token budget of a packed row."""
    group_tokens: int = 0
    """A group is closed when it would pass this many tokens; 0: row_tokens. Samples of T5 share no group."""
    layout: Literal["tree", "flat"] = "tree"
    """tree: the shared prefix once per group. flat: every leaf repeats its path (the reference; slower)."""
    workers: int = 1
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Rows each worker keeps ready."""
    error_budget: float = 0.01
    """Stop when more than this share of the samples read so far could not be used."""


@dataclass(frozen=True)
class ObjectiveConfig:
    lm: float = 1.0
    """Weight of the LM loss on targets; its denominator is supervised tokens of the whole step."""
    choice: float = 1.0
    """Weight of the softmax over candidate scores; its denominator is questions of the whole step."""
    choice_lm: float = 0.0
    """Weight of an LM loss on the correct candidate of choice samples."""
    load_balance: float = 0.01
    """Weight of the load-balance loss of model.adapters.router topk (Fedus et al., 2021), 1 when use is even; it is
    taken per group of samples and its denominator is tokens of the whole step. 0: off. Other routers have none."""
    temperature: float = 1.0
    """Candidate scores (mean token log-likelihood) are divided by this before the softmax."""


@dataclass(frozen=True)
class StageConfig:
    train: tuple[str, ...] = ("vision", "projector", "regions", "adapters", "language")
    """Parts that learn: vision, projector, regions, adapters, image_adapter and region_adapter (under
    model.adapters.router mixture), router (under mixture and topk), language, lora, aggregator, qformer, soft_prompt.
    All others are frozen (P10)."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Learning rate of a part relative to train.lr (default 1)."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    """Optimizer steps."""
    rows_per_step: int = 8
    """Packed rows per optimizer step over all ranks: the only step size (P3); accumulation is derived."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: int = 50
    """Steps of linear warm-up."""
    min_lr: float = 0.1
    """Cosine decay ends at this share of lr."""
    clip: float = 1.0
    """Global gradient norm; 0 switches clipping off."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    seed: int = 0
    zero: str = "zero3"
    """Name of a file in ds_configs/ (zero0 zero1 zero2 zero3 zero3_offload) or a path."""
    vision_chunk: int = 16
    """Images per call of the vision tower; the number of calls is agreed over ranks (P5)."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept; the newest verified and BEST are never removed."""
    eval_every: int = 0
    """Steps between evaluations on a fixed subset; 0: none."""
    log_every: int = 10
    ledger: bool = False
    """Write ledger-rank*.jsonl: attempt, step, micro-step, sample id."""
    threads: int = 0
    """CPU threads per rank; 0: cores divided by local ranks."""
    timeout_minutes: float = 10.0
    """Timeout of collectives."""
    watchdog_seconds: float = 600.0
    """Longest time a rank may give no sign of life, or not go on, before the run ends with exit code 5 and a report;
    0: never. Longer than the longest compilation, and the longest save of one file."""
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    """Signals that ask for a checkpoint and a planned stop (exit code 75)."""
    spike_sigma: float = 0.0
    """Skip a step whose loss or gradient norm lies this many standard deviations above its running mean; 0: never.
    Steps whose loss or gradient is no number are always skipped."""
    skip_limit: int = 20
    """Stop the run after this many skipped steps in a row."""


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 256
    """Questions of the fixed subset scored during training."""
    row_tokens: int = 0
    """0: data.row_tokens."""


@dataclass(frozen=True)
class IOConfig:
    run: str = "runs/default"
    """Run folder; all output of the run is below it."""
    init_from: str = ""
    """Run, checkpoint or folder of `eventlens convert` whose weights start this stage (--init-from)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint that verifies; never: refuse a run folder that has any."""
    tensorboard: bool = True
    lease_seconds: float = 30.0
    """How long the job that holds the run folder may be silent before another job may take it over."""
    accept: tuple[str, ...] = ()
    """Changes to accept when a run is continued: keys as the refusal names them, or data, tokenizer, base."""


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    io: IOConfig = field(default_factory=IOConfig)
