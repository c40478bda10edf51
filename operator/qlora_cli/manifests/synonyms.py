"""Names that other tools give to fields and values of a QLoRAJob; data only.

Names are in lower case without '_' and '-'. Sources: the argument classes of transformers, peft and TRL, the
configuration references of axolotl, LLaMA-Factory, Unsloth and torchtune, the fine-tuning APIs of OpenAI and Together,
the pod template of Kubernetes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Synonym:
    """What a QLoRAJob has instead of a field of another tool."""

    field: str | None = None
    """Path of the field; None: there is none."""
    note: str = ""
    """Unit of the field, or what to write; without a field, why there is none."""
    same_value: bool = False
    """Whether the value means the same there."""


def _same(field: str, note: str = "") -> Synonym:
    return Synonym(field, note, same_value=True)


_NO_IMAGE: Final = Synonym(
    note="the image is chosen for all runs by the installation, chart value trainerImage; remove it"
)
_NO_POD: Final = Synonym(
    note="a manifest has no pod settings but spec.resources; ask who installed the operator; remove it"
)
_DTYPE: Final = Synonym(
    note="the dtype is chosen: bfloat16 where the GPU has it, else float16; qlora plan shows it; remove it"
)
_ATTENTION: Final = Synonym(note="the attention kernel is chosen from the model and the GPU; remove it")
_CHECKPOINTING: Final = Synonym(note="activations are recomputed if they do not fit; qlora plan shows it; remove it")
_ACCUMULATION: Final = Synonym(
    "spec.training.globalBatchSize",
    "rows per step over all GPUs = micro-batch x accumulation x GPUs; the accumulation follows from it",
)
_NO_HUB: Final = Synonym(
    note="results go to spec.output.uri, and no further; upload its folder adapter/ yourself; remove it"
)
_TRACKERS: Final = Synonym("spec.tracking", "such as wandb: {project: NAME}, or mlflow; TensorBoard is on by default")
_FOUR_BITS: Final = Synonym("spec.quantization.bits", "4, which is the default; with method qlora")
_EIGHT_BITS: Final = Synonym("spec.quantization.bits", "8, with method qlora")
_CHECKPOINTS: Final = Synonym("spec.checkpoint.every", "a time, such as 10m, or steps: a number of steps")
_MICRO_BATCH: Final = _same(
    "spec.training.microBatchSize", "rows per GPU and forward pass; leave it out to let the plan choose"
)
_GLOBAL_BATCH: Final = _same("spec.training.globalBatchSize", "rows per step over all GPUs")
_LENGTH: Final = _same("spec.training.maxLength", "tokens")
_RATE: Final = _same("spec.training.learningRate")
_RANK: Final = _same("spec.lora.rank")
_MODEL: Final = Synonym("spec.model.uri", "hf://organization/name, s3://bucket/prefix, or a local folder")
_DATASET: Final = Synonym(
    "spec.dataset.uri", "s3://bucket/file.jsonl, hf://datasets/organization/name/file, or a local file"
)
_EVALUATE: Final = _same("spec.training.evaluateEvery", "steps")
_GPUS: Final = _same("spec.resources.gpusPerNode")
_OUTPUT: Final = Synonym("spec.output.uri", "s3://bucket/prefix, or a local folder")
_SYSTEM: Final = Synonym(
    note="a system message belongs into the rows, as the first of messages; for other rows write spec.dataset.template"
)
_SEED: Final = _same("spec.training.seed")
_ZERO: Final = Synonym("spec.distribution", "such as zero2; auto, the default, chooses")
_NO_RL: Final = Synonym(note="only supervised fine-tuning is supported, no preference data or reinforcement learning")

_ROWS: Final[tuple[tuple[str, Synonym], ...]] = (
    (
        "basemodel modelnameorpath modelname modelid modelpath model.name model.id model.path model.repo "
        "pretrainedmodel model.uris model.url",
        _MODEL,
    ),
    ("modelrevision revisionofmodel", _same("spec.model.revision")),
    (
        "hftoken token",
        Synonym("spec.model.secretRef.name", "name of a Secret with HF_TOKEN; qlora run uses the environment"),
    ),
    ("trustremotecode", Synonym(note="code of a model is never run, only architectures of transformers; remove it")),
    ("tokenizer", Synonym(note="the model's own tokenizer is used; remove it")),
    ("tokenizertype", Synonym(note="it is read from the model; remove it")),
    ("modeltype", Synonym(note="it is read from the model's config.json; remove it")),
    ("adapter finetuningtype", Synonym("spec.method", "qlora (4 bits, the default), lora or full")),
    ("usepeft", Synonym("spec.method", "qlora (the default) or lora train an adapter; full trains all weights")),
    ("fullfinetuning", Synonym("spec.method", "full, with quantization.bits 16")),
    ("loadin4bit 4bit", _FOUR_BITS),
    ("loadin8bit 8bit", _EIGHT_BITS),
    ("quantizationbit quantization.bit", _same("spec.quantization.bits")),
    (
        "quantizationmethod",
        Synonym("spec.quantization.bits", "4 or 8 with bitsandbytes; GPTQ, AWQ and HQQ are not supported"),
    ),
    ("bnb4bitquanttype quanttype", _same("spec.quantization.type")),
    ("bnb4bitusedoublequant", _same("spec.quantization.doubleQuant")),
    ("bnb4bitcomputedtype bf16 fp16 tf32 dtype torchdtype precision mixedprecision computedtype fp8", _DTYPE),
    ("r lorar lorarank lora.r", _RANK),
    ("loraalpha", _same("spec.lora.alpha")),
    ("loradropout", _same("spec.lora.dropout")),
    ("targetmodules loratargetmodules target", _same("spec.lora.targets")),
    ("loratarget", Synonym("spec.lora.targets", "[all-linear] or names")),
    ("loratargetlinear", Synonym("spec.lora.targets", "[all-linear]")),
    ("usedora peftusedora", _same("spec.lora.dora")),
    ("userslora", _same("spec.lora.rslora")),
    ("initloraweights", Synonym("spec.lora.init", "default, gaussian, pissa or loftq")),
    ("loramodulestosave", _same("spec.lora.modulesToSave")),
    ("additionaltarget", Synonym("spec.lora.modulesToSave", "a list")),
    ("bias", Synonym(note="biases are not trained; remove it")),
    ("tasktype", Synonym(note="only causal language models are trained; remove it")),
    ("perdevicetrainbatchsize perdevicebatchsize minibatchsize trainmicrobatchsizepergpu", _MICRO_BATCH),
    ("perdeviceevalbatchsize evalbatchsize", Synonym(note="evaluation uses the micro-batch of training; remove it")),
    ("gradientaccumulationsteps gradaccumsteps gradientaccumulation", _ACCUMULATION),
    ("batchsize trainbatchsize effectivebatchsize", _GLOBAL_BATCH),
    ("numtrainepochs numepochs nepochs epoch", _same("spec.training.epochs")),
    ("steps maxtrainsteps numsteps", _same("spec.training.maxSteps")),
    ("lr", _RATE),
    ("learningratemultiplier", Synonym("spec.training.learningRate", "the rate itself, such as 2e-4")),
    ("lrscheduler lrschedulertype schedulertype", _same("spec.training.scheduler")),
    ("warmupsteps warmup", Synonym("spec.training.warmupRatio", "a share of all steps, such as 0.03")),
    ("optim", Synonym("spec.training.optimizer", "auto, adamw, adamw8bit, pagedAdamw or pagedAdamw8bit")),
    ("adambeta1 adambeta2", Synonym(note="AdamW has its usual betas, 0.9 and 0.999; remove it")),
    ("maxgradientnorm gradientclipping gradientclipval gradclip", _same("spec.training.maxGradNorm")),
    ("gradientcheckpointing usegradientcheckpointing activationcheckpointing", _CHECKPOINTING),
    ("noisyembeddingalpha neftunenoisealpha", _same("spec.training.neftuneAlpha")),
    (
        "sequencelen sequencelength seqlen maxseqlength maxseqlen cutofflen maxtokens modelmaxlength blocksize "
        "contextlength",
        _LENGTH,
    ),
    ("samplepacking evalpacking", _same("spec.training.packing")),
    ("padtosequencelen", Synonym(note="rows are packed without padding (spec.training.packing); remove it")),
    (
        "groupbylength",
        Synonym(note="rows are packed without padding (spec.training.packing), so grouping saves nothing; remove it"),
    ),
    ("trainoninputs", Synonym("spec.training.loss", "all trains on prompts too; auto, the default, on answers only")),
    ("completiononlyloss", Synonym("spec.training.loss", "completion")),
    ("assistantonlyloss", Synonym("spec.training.loss", "assistant")),
    ("trainonresponsesonly", Synonym("spec.training.loss", "completion or assistant; auto, the default, does so")),
    (
        "dataset.type datasettype",
        Synonym("spec.dataset.format", "instruction, chat, completion or text; auto, the default, detects it"),
    ),
    (
        "dataset.path dataset.name dataset.file datasetname datasetpath datasets datapath data trainfile "
        "datafiles trainingfile traindata dataset.url",
        _DATASET,
    ),
    ("dataset.paths dataset.uris", Synonym("spec.dataset.sources", "a list of {uri: …}")),
    ("dataset.split", Synonym("spec.dataset.uri", "name the file of the split, hf://datasets/organization/name/file")),
    (
        "valsetsize valsize testsize validationsplit",
        _same("spec.dataset.evaluation.fraction", "share of the rows, above 0 and up to 0.5"),
    ),
    (
        "validationfile evaldataset testdatasets evalfile",
        Synonym("spec.dataset.evaluation.uri", "a file of held-out rows"),
    ),
    ("chattemplate", Synonym("spec.dataset.chatTemplate", "the template itself, in Jinja; default: the model's own")),
    ("systemprompt defaultsystem systemmessage", _SYSTEM),
    ("prompttemplate", Synonym("spec.dataset.template", "{prompt: '… {field} …', answer: '{field}'}")),
    ("datasettextfield", Synonym("spec.dataset.format", "text, for rows with a field text")),
    ("messagesfield", Synonym("spec.dataset.format", "chat, for rows with a field messages or conversations")),
    ("maxtrainsamples numsamples limit", _same("spec.dataset.maxSamples")),
    ("shuffle", Synonym(note="rows are always shuffled, by spec.training.seed; remove it")),
    ("randomseed randomstate", _SEED),
    ("dataloadernumworkers streaming", Synonym(note="rows are tokenized once, before training; remove it")),
    ("evalsteps evaluationsteps evalfreq", _EVALUATE),
    ("evalsperepoch evalstrategy evaluationstrategy", Synonym("spec.training.evaluateEvery", "a number of steps")),
    ("earlystoppingpatience", _same("spec.training.earlyStopping.patience")),
    ("loadbestmodelatend", Synonym("spec.training.keep", "best, with evaluateEvery")),
    ("savesteps", _same("spec.checkpoint.steps")),
    ("savestrategy savesperepoch saveevery", _CHECKPOINTS),
    ("savetotallimit", _same("spec.checkpoint.keep")),
    (
        "resumefromcheckpoint autoresumefromcheckpoints",
        Synonym(note="a run resumes from its last checkpoint by itself; remove it"),
    ),
    ("loggingsteps", Synonym(note="progress is reported by itself; remove it")),
    ("reportto wandb mlflow logto usewandb", _TRACKERS),
    ("wandbproject", _same("spec.tracking.wandb.project")),
    ("tensorboard", _same("spec.tracking.tensorboard")),
    ("wandbentity", _same("spec.tracking.wandb.entity")),
    ("wandbrunid", Synonym(note="the name of a run is that of its QLoRAJob; remove it")),
    ("runname jobname suffix", Synonym("metadata.name", "letters, digits and hyphens")),
    ("pushtohub hubmodelid hubstrategy", _NO_HUB),
    ("outputdir outputpath output.path output.dir output.bucket output.url savedir outdir", _OUTPUT),
    ("mergelora output.merge", Synonym("spec.output.merged", "bf16 also publishes the merged model")),
    ("overwriteoutputdir overwrite", Synonym("spec.output.ifExists", "Overwrite")),
    ("gpus gpu numgpus ngpus nprocpernode gpucount resources.gpus nvidia.com/gpu", _GPUS),
    ("numprocesses", Synonym("spec.resources.gpusPerNode", "one process per GPU")),
    ("nnodes numnodes nummachines replicas workers", _same("spec.resources.nodes")),
    ("gputype", Synonym("spec.resources.gpuProduct", "a value of the node label nvidia.com/gpu.product")),
    (
        "resources.limits resources.requests",
        Synonym("spec.resources", 'gpusPerNode: 1, cpu: "2", memory: 16Gi, without limits or requests'),
    ),
    ("instancetype", Synonym("spec.resources.nodeSelector", "a label of the nodes")),
    (
        "flashattention flashattention2 useflashattention flashattn attnimplementation sdpattention xformersattention",
        _ATTENTION,
    ),
    ("compile torchcompile", Synonym(note="models are not compiled; remove it")),
    ("deepspeed fsdp fsdpconfig strategy zerostage deepspeedconfig", _ZERO),
    ("image containerimage baseimage", _NO_IMAGE),
    (
        "command args env envfrom environment volumes volumemounts podtemplate template.spec containers "
        "securitycontext imagepullsecrets",
        _NO_POD,
    ),
    ("affinity", Synonym("spec.resources.nodeSelector", "labels that the nodes must have")),
    ("labels", Synonym("metadata.labels", "labels of the QLoRAJob")),
    ("serviceaccount", _same("spec.output.serviceAccountName")),
    ("priorityclassname", Synonym("spec.queue.priorityClass", "of a Kueue queue")),
    ("queuename", _same("spec.queue.name")),
    ("ttlsecondsafterfinished", Synonym("spec.ttl", "a number and a unit, such as 7d")),
    ("activedeadlineseconds timeout", Synonym("spec.deadlines.total", "a number and a unit, such as 24h")),
    ("backofflimit maxretries", _same("spec.retries.maxAttempts")),
    (
        "secret",
        Synonym("spec.output.secretRef.name", "name of a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ),
    ("secretname", Synonym("spec.output.secretRef.name", "name of a Secret")),
    ("rl dpobeta prefbeta rewardmodel beta", _NO_RL),
    ("stage", Synonym(note="only supervised fine-tuning (sft) is supported; remove it")),
)
FIELDS: Final[Mapping[str, Synonym]] = {name: synonym for known, synonym in _ROWS for name in known.split()}
"""By the name, or by block and name where the name alone has another meaning elsewhere."""

_VALUE_ROWS: Final = (
    ("optimizer", "adamw", "adamwtorch adamwtorchfused adamwhf adam fusedadamw"),
    ("optimizer", "adamw8bit", "adamwbnb8bit adam8bit"),
    ("optimizer", "pagedAdamw", "pagedadamw32bit"),
    ("scheduler", "constant", "constantwithwarmup none"),
    ("scheduler", "cosine", "cosinewithrestarts"),
    ("scheduler", "linear", "polynomial"),
    ("format", "instruction", "alpaca instruct"),
    ("format", "chat", "sharegpt chatml messages conversation openai conversations chattemplate"),
    ("format", "auto", "jsonl json csv parquet sft"),
    ("format", "completion", "inputoutput promptcompletion"),
    ("format", "text", "raw plain pretrain"),
    ("method", "qlora", "sft 4bit"),
    ("method", "lora", "peft"),
    ("method", "full", "fullfinetuning"),
    ("distribution", "zero2", "deepspeed zero1 stage2"),
    ("distribution", "zero3", "fsdp fsdp2 stage3"),
    ("distribution", "auto", "none"),
    ("distribution", "ddp", "dp"),
    ("ifExists", "Overwrite", "replace always"),
    ("ifExists", "Fail", "error"),
    ("ifExists", "Skip", "ignore"),
    ("merged", "bf16", "true fp16 merged16bit yes"),
    ("merged", "none", "false no"),
    ("mergeBase", "dequantised", "dequantized"),
    ("type", "nf4", "int4 normalfloat4 4bit"),
    ("init", "default", "true kaiming"),
    ("keep", "best", "true bestmodel"),
    ("keep", "last", "final"),
    ("loss", "completion", "response answer"),
    ("loss", "all", "full"),
    ("loss", "assistant", "assistantonly"),
    ("longRows", "refuse", "error fail"),
    ("longRows", "drop", "skip"),
    ("longRows", "truncate", "cut"),
    ("onInvalidRow", "drop", "skip ignore"),
    ("onInvalidRow", "refuse", "error fail"),
)
VALUES: Final[Mapping[str, Mapping[str, str]]] = {
    field: {other: value for name, value, others in _VALUE_ROWS if name == field for other in others.split()}
    for field, _, _ in _VALUE_ROWS
}
"""Values of other tools by field, in the same spelling, and the nearest one of a QLoRAJob."""


def spelling(name: str) -> str:
    """Return a name in the spelling of the tables."""
    return name.lower().replace("_", "").replace("-", "")


def synonym_of(parent: str, name: str) -> Synonym | None:
    """Return what a QLoRAJob has instead of a field of another tool."""
    return FIELDS.get(f"{spelling(parent)}.{spelling(name)}") or FIELDS.get(spelling(name))
