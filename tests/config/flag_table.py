"""What each flag does: an entry for every flag and every choice, which test_flags runs."""

from tests import runs
from tests.checks import (
    becomes,
    column,
    from_to,
    goes_on_from,
    has,
    leaves_out,
    less_is_kept,
    lists,
    losses_from,
    more_is_kept,
    more_parameters,
    named,
    other_validation,
    prints,
    reports,
    same_dry_loss,
    same_losses,
    says,
    shape,
    slightly_other_losses,
    stops_at,
)
from tests.config.checkpoint_flags import CHECKPOINT_FLAGS
from tests.config.flag_effects import (
    BERT,
    BPE,
    CASED,
    DEEP,
    FULL,
    HIDDEN,
    LAYERS,
    LONGER,
    MEGATRON,
    MORE_PIECES,
    PIECES,
    PLAIN,
    PRESET_SHAPES,
    REAL,
    RESUMED,
    ROPE,
    SAVES,
    SCALED_ROPE,
    STAGES,
    STREAMS,
    TENSORS,
    VOCABULARY,
    Effect,
    dry,
    effect,
)
from tests.config.optimizer_flags import OPTIMIZER_FLAGS

LION = {"optimizer": "lion"}
MUON = {"optimizer": "muon"}
FOUR_LAYERS = {**STAGES, "num_layers": 4}
VIRTUAL = "num_virtual_stages_per_pipeline_rank"
TWO = {**FOUR_LAYERS, VIRTUAL: 2}
ORDER = dict(base=FOUR_LAYERS, ranks=2, observe=runs.order_of_passes)
PLAIN_PASSES = ["FFBFBFBB", "FBFBFBFB"]
"""Of each rank, with 1F1B and four microbatches."""
LOOPED = ["FFFFFBFBFBFBBBBB", "FFFBFBFBFBFBFBBB"]
"""With two stages on each rank."""
DIVIDED = ["FFBBFBBFBBBB", "FBFBBFBBFBBB"]
V_SHAPED = ["FFFFBBFBBFBBFBBBBFBBBBBB", "FFFFBBFBBFBBFBBFBBBBBBBB"]
DEEP_STAGES = STAGES | {"num_layers": 4}


def second_stage(layers: str) -> str:
    """What a dry run prints of the second stage's layers."""
    return f"rank 1 (stage 1, data 0, tensor 0): layers {layers}"


FLAGS: dict[str, list[Effect]] = {
    # model
    "architecture": [effect("bert", losses_from(1), says("mlm loss"))],
    "preset": [
        Effect(
            name,
            (has(preset=name, num_layers=layers, hidden_size=hidden, **family),),
            observe=runs.of_the_preset,
        )
        for name, (layers, hidden, family) in PRESET_SHAPES.items()
    ],
    "num_layers": [dry(3, shape("layers.2.attention.qkv.weight", 4, 3, 4, 16))],
    "hidden_size": [dry(32, shape("final_norm.weight", 32))],
    "num_attention_heads": [dry(2, shape("layers.0.attention.qkv.weight", 2, 3, 8, 16))],
    "ffn_hidden_size": [dry(24, shape("layers.0.mlp.down.weight", 16, 24))],
    "kv_channels": [dry(6, shape("layers.0.attention.qkv.weight", 4, 3, 6, 16))],
    "num_query_groups": [dry(2, shape("layers.0.attention.qkv.weight", 2, 4, 4, 16))],
    "seq_length": [effect(8, column("tokens", 32, 32, 32, 32))],
    "max_position_embeddings": [dry(32, shape("embedding.position_embeddings.weight", 32, 16))],
    "position_embedding_type": [
        effect("rope", losses_from(1), more_parameters(-16 * HIDDEN)),
        effect("none", losses_from(1), more_parameters(-16 * HIDDEN)),
        effect("none", losses_from(1), base=ROPE),
    ],
    "rotary_base": [effect(10.0, losses_from(1), base=ROPE)],
    "rope_scaling": [
        effect(
            "llama3", losses_from(1), base=ROPE, also={"rope_original_max_position_embeddings": 8}
        )
    ],
    "rope_scaling_factor": [effect(2.0, losses_from(1), base=SCALED_ROPE)],
    "rope_low_freq_factor": [effect(0.5, losses_from(1), base=SCALED_ROPE)],
    "rope_high_freq_factor": [effect(2.0, losses_from(1), base=SCALED_ROPE)],
    "rope_original_max_position_embeddings": [
        effect(64, losses_from(1), base={**ROPE, "rope_scaling": "llama3"})
    ],
    "normalization": [
        effect("RMSNorm", losses_from(1), more_parameters(-(2 * LAYERS + 1) * HIDDEN))
    ],
    "norm_backend": [
        effect(
            "torch",
            same_losses,
            says("norms: torch (--norm-backend)"),
            base={"normalization": "RMSNorm"},
        ),
        effect(
            "apex",
            says("--norm-backend apex needs a GPU, but there is --device cpu"),
            observe=runs.complaints,
        ),
    ],
    "norm_placement": [
        dry(
            "post", prints("embedding_norm.weight [16]"), leaves_out("final_norm.weight"), base=BERT
        )
    ],
    "gelu": [
        effect("erf", slightly_other_losses, base={"init_method_std": 1.0, "precision": "fp64"})
    ],
    "norm_epsilon": [effect(0.1, losses_from(1))],
    "swiglu": [dry(True, shape("layers.0.mlp.up.weight", 2, 64, 16))],
    "disable_bias_linear": [
        dry(True, leaves_out("layers.0.attention.qkv.bias"), leaves_out("layers.1.mlp.down.bias"))
    ],
    "add_qkv_bias": [
        dry(True, shape("layers.0.attention.qkv.bias", 4, 3, 4), base={"disable_bias_linear": True})
    ],
    "qk_layernorm": [
        dry(
            True,
            shape("layers.1.attention.query_norm.weight", 4),
            shape("layers.1.attention.key_norm.bias", 4),
        )
    ],
    "untie_embeddings_and_output_weights": [dry(True, shape("output.weight", 128, 16))],
    "vocab_size": [effect(100, losses_from(1), more_parameters((100 - VOCABULARY) * HIDDEN))],
    "make_vocab_size_divisible_by": [
        dry(32, shape("embedding.word_embeddings.weight", 64, 16), same_dry_loss)
    ],
    "attention_dropout": [effect(0.5, losses_from(1))],
    "attention_backend": [
        effect(name, same_losses, says(f"attention: {name} (--attention-backend {name})"))
        for name in ("sdpa", "fused-softmax", "eager")
    ],
    "hidden_dropout": [effect(0.5, losses_from(1))],
    "init_method_std": [effect(0.2, losses_from(1))],
    # recompute
    "recompute_granularity": [
        effect("selective", less_is_kept, base=DEEP, observe=runs.kept_for_backward),
        effect("full", less_is_kept, base=DEEP, observe=runs.kept_for_backward),
    ],
    "recompute_activations": [
        effect(True, less_is_kept, base=DEEP, observe=runs.kept_for_backward)
    ],
    "recompute_method": [effect("block", more_is_kept, base=FULL, observe=runs.kept_for_backward)],
    "recompute_num_layers": [effect(2, less_is_kept, base=FULL, observe=runs.kept_for_backward)],
    # optimizer
    **OPTIMIZER_FLAGS,
    # data
    "data_path": [
        effect("../other_text_document", losses_from(1), base=REAL),
        effect(
            ("1", "../bytes_text_document", "1", "../other_text_document"),
            losses_from(1),
            base=REAL,
        ),
    ],
    "train_data_path": [
        effect("../other_text_document", losses_from(1), other_validation, base=REAL)
    ],
    "valid_data_path": [effect("../other_text_document", same_losses, other_validation, base=REAL)],
    "sample_order": [
        effect("megatron", losses_from(1), base=REAL),
        effect("counted", losses_from(1), base=MEGATRON),
    ],
    "mock_data": [
        effect(True, losses_from(1), base={**REAL, "vocab_size": 257}, also={"data_path": None})
    ],
    "split": [effect("50,25,25", same_losses, other_validation, base={**REAL, "split": "50,50,0"})],
    "tokenizer_type": [
        effect("SentencePieceTokenizer", more_parameters(43 * HIDDEN), base=REAL, also=PIECES),
        effect(
            "ByteTokenizer",
            more_parameters(-43 * HIDDEN),
            base=REAL | PIECES,
            also=REAL | {"tokenizer_model": None},
        ),
        *(
            effect(
                also["tokenizer_type"],
                more_parameters((size - 257) * HIDDEN),
                base=PLAIN,
                also=also,
            )
            for size, also in (
                (330, BPE),
                (
                    120,
                    CASED
                    | {"tokenizer_type": "BertWordPieceLowerCase", "vocab_file": "../uncased.txt"},
                ),
                (130, CASED),
                (332, {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "../hf"}),
                (
                    50257,
                    {"tokenizer_type": "TikTokenizer", "tokenizer_model": "../r50k_base.tiktoken"},
                ),
                (100, {"tokenizer_type": "NullTokenizer", "vocab_size": 100}),
            )
        ),
    ],
    "vocab_file": [effect("../uncased.txt", more_parameters(-10 * HIDDEN), base=PLAIN | CASED)],
    # Other merges make other ids of a text: a run, which reads ids, knows them by the data's
    # description.
    "merge_file": [
        effect(
            "../other.txt",
            says("--merge-file ../other.txt (330 entries) is not the one"),
            base=REAL | BPE | {"data_path": "../merged"},
            observe=runs.complaints,
        )
    ],
    "tokenizer_model": [
        effect(
            "../more.model",
            more_parameters(20 * HIDDEN),
            base=REAL | PIECES,
            also={"data_path": MORE_PIECES},
        )
    ],
    "tiktoken_pattern": [
        effect(
            "cl100k_base",
            says("too few for the 100277 entries of the tokenizer"),
            base=PLAIN
            | {"tokenizer_type": "TikTokenizer", "tokenizer_model": "../r50k_base.tiktoken"},
            observe=runs.complaints,
        )
    ],
    # Training encodes no text: the checkpoint records it for prompts.
    "parse_special_tokens": [
        effect(True, has(parse_special_tokens=True), base=PLAIN | BPE, observe=runs.resolved)
    ],
    "micro_batch_size": [
        dry(2, prints("dry run: 2 microbatches"), same_dry_loss),
        dry(2, says("sends [16, 2, 16] to the next stage"), base=STAGES, ranks=2),
    ],
    "rampup_batch_size": [effect(("2", "1", "6"), column("consumed_samples", 2, 4, 7, 11))],
    "global_batch_size": [effect(8, column("consumed_samples", 8, 16, 24, 32), losses_from(1))],
    "eod_mask_loss": [effect(True, losses_from(1), base=REAL)],
    "reset_position_ids": [
        effect(True, losses_from(1), base=REAL),
        effect(True, losses_from(1), base={**REAL, **ROPE}),
    ],
    "reset_attention_mask": [effect(True, losses_from(1), base=REAL)],
    # parallel
    "mask_prob": [effect(0.5, losses_from(1), base=BERT)],
    "short_seq_prob": [effect(1.0, losses_from(1), base=BERT)],
    "bert_pair": [
        effect("nsp", losses_from(1), base=BERT),
        effect("none", losses_from(1), leaves_out("pair loss"), base=BERT),
    ],
    "whole_word_mask": [effect(True, losses_from(1), base=BERT)],
    "max_ngrams": [effect(3, losses_from(1), base=BERT)],
    "tensor_model_parallel_size": [
        dry(2, shape("layers.0.mlp.up.weight", 32, 16), same_dry_loss, ranks=2)
    ],
    "pipeline_model_parallel_size": [dry(2, prints(second_stage("1-1")), same_dry_loss, ranks=2)],
    # Of 4 layers, 2 and 2 by default; of 3, 2 and 1.
    "pipeline_split": [
        dry(("1,3",), prints(second_stage("1-3")), same_dry_loss, base=DEEP_STAGES, ranks=2)
    ],
    "decoder_first_pipeline_num_layers": [
        dry(1, prints(second_stage("1-3")), same_dry_loss, base=DEEP_STAGES, ranks=2)
    ],
    "decoder_last_pipeline_num_layers": [
        dry(1, prints(second_stage("3-3")), same_dry_loss, base=DEEP_STAGES, ranks=2)
    ],
    "account_for_embedding_in_pipeline_split": [
        dry(
            True,
            prints(second_stage("1-2")),
            same_dry_loss,
            base=STAGES | {"num_layers": 3},
            ranks=2,
        )
    ],
    "account_for_loss_in_pipeline_split": [
        # The output layer weighs more than 7 layers.
        dry(
            True,
            prints(second_stage("3-4")),
            same_dry_loss,
            base=STAGES | {"num_layers": 5, "vocab_size": 2000},
            ranks=2,
        )
    ],
    "sequence_parallel": [
        dry(
            True,
            says("sends [8, 1, 16] to the next stage"),
            same_dry_loss,
            base=TENSORS | STAGES,
            ranks=4,
        )
    ],
    "pipeline_schedule": [
        effect("1f1b", from_to(LOOPED, PLAIN_PASSES), also={VIRTUAL: 1}, **ORDER | {"base": TWO}),
        effect("gpipe", from_to(PLAIN_PASSES, ["FFFFBBBB", "FFFFBBBB"]), **ORDER),
        effect("interleaved", from_to(PLAIN_PASSES, LOOPED), **ORDER),
        # A backward in two parts.
        effect("zb-h1", from_to(PLAIN_PASSES, DIVIDED), **ORDER),
        effect("zb-v", from_to(PLAIN_PASSES, V_SHAPED), **ORDER),
        # The model is so small that further messages cost more than they save.
        effect("auto", from_to(PLAIN_PASSES, DIVIDED), **ORDER),
    ],
    "memory_limit_gib": [
        # Enough for one of the schedules only.
        effect(
            0.0002,
            from_to(DIVIDED, PLAIN_PASSES),
            **ORDER | {"base": {**FOUR_LAYERS, "pipeline_schedule": "auto"}},
        )
    ],
    VIRTUAL: [effect(2, from_to(PLAIN_PASSES, LOOPED), **ORDER)],
    "num_layers_per_virtual_pipeline_stage": [effect(1, from_to(PLAIN_PASSES, LOOPED), **ORDER)],
    "microbatch_group_size_per_virtual_pipeline_stage": [
        effect(
            4,
            from_to(LOOPED, ["FFFFFFFBFBBBBBBB", "FFFFFBFBFBFBBBBB"]),
            **ORDER | {"base": {**FOUR_LAYERS, "pipeline_schedule": "interleaved"}},
        )
    ],
    "use_distributed_optimizer": [
        effect(True, from_to("FBFBRRFBFB", "FBFBRRGGFBFB"), ranks=2, observe=runs.data_calls)
    ],
    "overlap_grad_reduce": [
        effect(True, from_to("FBFBRRFBFB", "FBFBRRFBFBR"), ranks=2, observe=runs.data_calls)
    ],
    "overlap_param_gather": [
        effect(
            True,
            from_to(
                "FBFB" + 14 * "R" + 14 * "G" + "FBFB", "FBFB" + 14 * "R" + 11 * "G" + "FGGGBFB"
            ),
            base={"use_distributed_optimizer": True, "ddp_bucket_size": 1000},
            ranks=2,
            observe=runs.data_calls,
        )
    ],
    "ddp_bucket_size": [
        effect(
            1000,
            from_to("FBFBRRFBFBR", "FBFRRRRRRBRRRRRRRRFBFRRRRRRBR"),
            base={"overlap_grad_reduce": True},
            ranks=2,
            observe=runs.data_calls,
        )
    ],
    "deepspeed": [
        effect(
            True,
            from_to("", "ZeRO stage 2, as ../stage2.json says"),
            also={"deepspeed_config": "../stage2.json"},
            observe=runs.deepspeed_summary,
        )
    ],
    "deepspeed_config": [
        effect(
            "../stage3.json",
            from_to("ZeRO stage 2, as ../stage2.json says", "ZeRO stage 3, as ../stage3.json says"),
            base={"deepspeed": True, "deepspeed_config": "../stage2.json"},
            observe=runs.deepspeed_summary,
        )
    ],
    "world_size": [
        effect(
            8,
            says("status 0", instead_of="status None"),
            says("8 = tensor 1 x pipeline 1 x data 8"),
            base={"global_batch_size": 16},
            observe=runs.check_only,
        )
    ],
    "device": [
        effect("auto", says("on cpu (0 GPU(s) on this node", "on cuda")),
        effect("cpu", says("on cpu (as --device cpu says)"), base={"device": "auto"}),
        effect(
            "cuda",
            says("--device cuda: 0 GPU(s) on this node", "on cuda"),
            observe=runs.refusal_or_start,
        ),
    ],
    "distributed_backend": [
        effect("nccl", says("nccl works on GPUs only"), observe=runs.refusal_or_start),
        effect(
            "gloo",
            says("on cpu"),
            base={"distributed_backend": "nccl"},
            observe=runs.refusal_or_start,
        ),
    ],
    "distributed_timeout_minutes": [
        effect(
            0.02,
            says("Timed out waiting 1200ms", instead_of="total 4"),
            ranks=2,
            observe=runs.waiting_for_late_rank,
        )
    ],
    "hang_timeout": [
        effect(
            0.5,
            says("HANG: no progress", instead_of="all ranks are done"),
            base={"eval_interval": 0, "eval_iters": 0},
            also={"save": "hung"},
            ranks=2,
            observe=runs.waiting_for_slow_rank,
        )
    ],
    "check_stragglers": [effect(True, says("a product of 512 x 512 matrices: median"))],
    # checkpoint
    "save": [effect("saved", becomes("saved", [4]))],
    "save_interval": [effect(2, becomes("saved", [2, 4]), base=SAVES)],
    "keep_last": [effect(1, becomes("saved", [4]), base={**SAVES, "save_interval": 1})],
    "async_save": [
        effect(True, says("; training was stopped for"), base={**SAVES, "save_interval": 2})
    ],
    "keep_every": [effect(2, becomes("saved", [2, 4]), base={**SAVES, "save_interval": 1})],
    "load_fallback": [
        effect(
            True,
            says("going back to iter_0000002", instead_of="--load-fallback goes back to the last"),
            base={**RESUMED, "load": "../damaged"},
            observe=runs.failure_or_run,
        )
    ],
    "verify_checkpoint": [
        effect(
            "off",
            says("resumed from ../damaged/iter_0000004", instead_of="differ from their checksum"),
            base={**RESUMED, "load": "../damaged"},
            observe=runs.failure_or_run,
        ),
        effect(
            "off",
            says("weights from ../damaged/iter_0000004", instead_of="differ from their checksum"),
            base={**LONGER, "pretrained_checkpoint": "../damaged"},
            observe=runs.failure_or_run,
        ),
    ],
    "load": [effect("../trained", goes_on_from(4), base=LONGER)],
    "load_hf": [effect("../published", losses_from(1))],
    "ckpt_step": [effect(2, becomes("iterations", [3, 4, 5, 6, 7, 8]), base=RESUMED)],
    "finetune": [
        effect(True, becomes("iterations", [1, 2, 3, 4, 5, 6, 7, 8]), base=RESUMED),
        effect(True, losses_from(1), base=LONGER, also={"load": "../trained"}),
    ],
    "no_load_optim": [effect(True, losses_from(2), base=RESUMED)],
    "allow_data_change": [
        effect(
            True,
            says(
                "the training data changes here: seed 1234 -> 7",
                instead_of="the training data is not what",
            ),
            base={**RESUMED, "seed": 7},
            observe=runs.refusal_or_run,
        )
    ],
    "no_load_rng": [
        effect(True, losses_from(1), base={**RESUMED, **STREAMS, "load": "../trained-with-streams"})
    ],
    **CHECKPOINT_FLAGS,
    # training
    "train_iters": [effect(5, becomes("iterations", [1, 2, 3, 4, 5]))],
    "train_samples": [
        effect(24, column("consumed_samples", 4, 8, 12, 16, 20, 24), also={"train_iters": None})
    ],
    "train_tokens": [
        effect(300, column("consumed_samples", 4, 8, 12, 16, 20), also={"train_iters": None})
    ],
    "eval_interval": [
        effect(1, becomes("validated", [1, 2, 3, 4])),
        effect(0, becomes("validated", []), also={"eval_iters": 100}),
    ],
    "eval_iters": [
        effect(2, other_validation),
        effect(0, becomes("validated", []), also={"eval_interval": 1000}),
    ],
    "log_interval": [effect(3, reports(3, 4))],
    "log_communication": [effect(True, says("  data   all_reduce"), same_losses, ranks=2)],
    "metrics_file": [
        effect("metrics.jsonl", becomes("files", {"metrics.jsonl"}), base={"metrics_file": None})
    ],
    "tensorboard_dir": [effect("board", lists("board/events"), same_losses)],
    "wandb_project": [effect("demo", lists("wandb/offline-run-"), same_losses)],
    "wandb_exp_name": [
        effect("second", named("second"), base={"wandb_project": "demo"}, observe=runs.wandb_name)
    ],
    "profile": [effect("2-3", lists("profile/iteration-2-rank-00000.trace.json.gz"), same_losses)],
    "profile_dir": [
        effect("traces", lists("traces/iteration-2-rank-00000"), base={"profile": "2-2"})
    ],
    "profile_ranks": [
        effect(
            ("0", "1"), lists("profile/iteration-2-rank-00001"), base={"profile": "2-2"}, ranks=2
        )
    ],
    "trace": [effect("traces", lists("traces/trace-rank-00000.json"), same_losses)],
    "trace_iterations": [
        effect("2-2", says("trace of iterations 2 to 2"), same_losses, base={"trace": "traces"})
    ],
    "exit_interval": [effect(3, stops_at(3, "--exit-interval 3"))],
    "exit_duration_in_mins": [effect(1e-6, stops_at(1, "--exit-duration-in-mins 1e-06 are over"))],
    "exit_signal_handler": [
        effect(
            False,
            says("ended at once", instead_of="stopped at iteration 1: SIGUSR1"),
            observe=runs.signalled,
        )
    ],
    "seed": [effect(7, losses_from(1))],
    "rng_scheme": [
        effect("megatron", losses_from(1), base={"hidden_dropout": 0.1}),
        effect("global", losses_from(1), base={"hidden_dropout": 0.1, **STREAMS}),
    ],
    "check_replicas": [effect(2, says("replicas are bitwise equal"), ranks=2)],
    "dry_run": [effect(True, says("nothing was saved"), becomes("files", set()))],
}
