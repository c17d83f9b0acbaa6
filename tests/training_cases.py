"""Twenty steps of each kind of training, on any number of ranks: what tests/test_distributed.py compares."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import repdeg_fast
from repdeg_fast import MultiLayerMLMHead, add_cosine_regularization_, contrastive_loss
from repdeg_fast.distributed import VocabularyParallel
from repdeg_fast.integrations import huggingface
from repdeg_fast.models.amos import AmosConfig, AmosForPreTraining
from repdeg_fast.models.condenser import CoCondenserForPreTraining
from repdeg_fast.nn import AdminEncoder, AdminEncoderLayer
from repdeg_fast.training import cached_backward

STEPS, ROWS, LENGTH, V, D = 20, 8, 9, 67, 16
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": D}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": LENGTH}


class Training:
    """A model, its layers for FSDP, and the loss of the rows of a batch that a rank has."""

    shares_masks = True  # equally many in each row, where the loss does not weigh ranks
    rate = 0.1

    def batch(self, step):
        """The whole batch: words, which of them are masked, and labels."""
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(1, V, (ROWS, LENGTH), generator=generator)
        scores = torch.rand(ROWS, LENGTH, generator=generator)
        scores[:, 0] = 1
        masked = scores.argsort(dim=1).argsort(dim=1) < 3 if self.shares_masks else scores < 0.3
        return {"input_ids": words.masked_fill(masked, 1), "labels": words.masked_fill(~masked, -100)}

    def layers(self):
        return list(self.model.base_model.encoder.layer)

    def loss(self, model, batch, step):
        return model(**batch).loss

    def backward(self, model, batch, step):
        loss = self.loss(model, batch, step)
        loss.backward()
        return loss

    def shown(self, loss):
        return loss

    def after_backward(self):
        pass


class Amos(Training):
    shares_masks = False

    def __init__(self):
        config = AmosConfig(**SIZES, mlm_layers=(1, 2), rtd_weight=5.0)
        self.model, self.ids = AmosForPreTraining(config), []

    def layers(self):
        return [*self.model.discriminator.encoder.layer, *self.model.generator.encoder.layer]

    def loss(self, model, batch, step):
        output = model(**batch, seed=step)
        self.ids.append(output.sampled_ids)
        return output.loss


class Condenser(Training):
    shares_masks = False

    def __init__(self):
        self.model = CoCondenserForPreTraining(BertForMaskedLM(BertConfig(**SIZES)), skip_from=1, late_mlm=True)

    def layers(self):
        return [*self.model.model.bert.encoder.layer, *self.model.head]

    def loss(self, model, batch, step):
        output = model(**batch)
        self.contrastive = output.contrastive_loss.detach()
        return output.loss

    def shown(self, loss):
        """The contrastive loss counts once a rank."""
        return loss - self.contrastive * (1 - 1 / distributed.get_world_size())


class CachedCondenser(Condenser):
    """The same, in chunks."""

    def backward(self, model, batch, step):
        encode = lambda chunk: self.model.encoded(chunk, model)  # noqa: E731
        losses = cached_backward(encode, self.model.contrastive_loss, batch, chunk_size=3, module=model)
        self.contrastive = losses.embedding_loss
        return losses.loss


class HuggingFace(Training):
    def __init__(self):
        self.model = huggingface.apply(BertForMaskedLM(BertConfig(**SIZES)), admin_norm=True)


class Causal(Training):
    def __init__(self):
        sizes = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1)
        self.model = huggingface.apply(GPT2LMHeadModel(config))


class Admin(Training):
    """A post-LN encoder, profiled on the ranks' own rows before it is trained."""

    def __init__(self):
        layer = AdminEncoderLayer(D, 2, D, dropout=0.0, batch_first=True)
        self.model = nn.Sequential(nn.Embedding(V, D), AdminEncoder(layer, 3), nn.Linear(D, V))

    def prepare(self, batch):
        self.table = repdeg_fast.initialize_admin_(self.model, batch["input_ids"])

    def layers(self):
        return list(self.model[1].layers)

    def loss(self, model, batch, step):
        return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


class Tied(nn.Module):
    """Words, a layer, and a head that projects on the words."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = MultiLayerMLMHead(D, self.words)

    def forward(self, words, labels):
        hidden = self.layer(self.words(words)).tanh()
        return self.head([hidden, 2 * hidden], labels).sum()


class LanguageModel(Training):
    """With CosReg straight into the gradient of the words, sharded or not."""

    def __init__(self):
        self.model = Tied()

    def layers(self):
        return [self.model.layer]

    def loss(self, model, batch, step):
        return model(batch["input_ids"], batch["labels"])

    def after_backward(self):
        add_cosine_regularization_(self.model.words.weight, 0.5)


class TiedApart(LanguageModel):
    """FSDP cuts the words by themselves."""

    def layers(self):
        return [self.model.words]


class Contrastive(Training):
    def __init__(self, exchange="gather"):
        self.model, self.exchange = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D)), exchange

    def layers(self):
        return [self.model[1]]

    def loss(self, model, batch, step):
        queries, documents = model(batch["input_ids"]).tanh().unflatten(1, (3, -1)).mean(dim=2)[:, :2].unbind(dim=1)
        group = distributed.group.WORLD
        return contrastive_loss(queries, documents, group=group, exchange=self.exchange)


class SentenceTransformers(Contrastive):
    """The converted loss, whose columns sentence-transformers gathers."""

    def __init__(self):
        from repdeg_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

        super().__init__()
        self.objective = MultipleNegativesRankingLoss(self.model, gather_across_devices=True)

    def loss(self, model, batch, step):
        sides = model(batch["input_ids"]).tanh().unflatten(1, (3, -1)).mean(dim=2)[:, :2].unbind(dim=1)
        return self.objective.compute_loss_from_embeddings(list(sides))


class Ring(Contrastive):
    def __init__(self):
        super().__init__("ring")


def train(rank, kind, wrap, steps=range(STEPS), folder=None):
    """Losses of the steps as all ranks have them on average, parameters at the end, and ids where there are.
    ``folder``: of a checkpoint, read where ``steps`` begin later, else written."""
    ranks = distributed.get_world_size()
    training = globals()[kind]()
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks) if wrap != "vocabulary" else slice(None)
    batches = [{name: value[mine] for name, value in training.batch(step).items()} for step in steps]
    if hasattr(training, "prepare"):
        training.prepare(batches[0])
    model = training.model.train()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    elif wrap == "vocabulary":
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), VocabularyParallel())
        model.data_parallel_group, _ = distributed.new_subgroups(1)
    elif wrap:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in training.layers() if wrap == "fsdp-layers" else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=training.rate), []
    if folder and steps.start:
        state = get_model_state_dict(model)
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state)
    for step, batch in zip(steps, batches, strict=True):
        optimizer.zero_grad()
        loss = training.backward(model, batch, step)
        if isinstance(model, FSDPModule):
            model.reshard()
        training.after_backward()
        optimizer.step()
        losses.append(training.shown(loss.detach()))
    if folder and not steps.start:
        checkpoint.save(get_model_state_dict(model), checkpoint_id=folder)
    total = torch.stack(losses)
    distributed.all_reduce(total)
    parameters = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in training.model.named_parameters()
    }
    ids = [None] * ranks
    distributed.all_gather_object(ids, getattr(training, "ids", []))
    ids = ids[:1] if mine == slice(None) else ids
    together = [torch.cat(parts) for parts in zip(*ids, strict=True)]
    return {"losses": total / ranks, "parameters": parameters, "ids": together}


def example(rank, arguments, steps):
    """Steps of the example that trains a language model with CosReg, and a checkpoint; what its history says."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import train_lm_cosreg

    run = train_lm_cosreg.Run(train_lm_cosreg.parse(arguments))
    run.model.eval()  # no dropout, which differs from rank to rank
    run.options.output.mkdir(exist_ok=True)
    for _ in range(steps):
        run.step()
    run.save()
    distributed.barrier()
    return run.history
