"""What each rule of the configuration finds: a case for every rule, which test_validate runs."""

from tests.config.validation import BERT

RAMP = {"global_batch_size": 16, "rampup_batch_size": ("4", "4", "60")}
PIPELINE = {"pipeline_model_parallel_size": 2}
INTERLEAVED = PIPELINE | {"pipeline_schedule": "interleaved", "global_batch_size": 8}
CASES = {
    # what is wrong: (changes of SOUND, ranks, words that the problem must have)
    "heads of hidden": (dict(hidden_size=770), 1, "--hidden-size 770 --num-attention-heads 12"),
    "groups of heads": (
        dict(num_query_groups=5),
        1,
        "--num-attention-heads 12 --num-query-groups 5",
    ),
    "inverted rope scaling": (
        dict(position_embedding_type="rope", rope_scaling="llama3", rope_low_freq_factor=4.0),
        1,
        "--rope-low-freq-factor 4 --rope-high-freq-factor 4",
    ),
    "idle rope scaling": (dict(rope_scaling="llama3"), 1, "--rope-scaling llama3 rope"),
    "idle rope factor": (
        dict(position_embedding_type="rope", rope_scaling_factor=32.0),
        1,
        "--rope-scaling-factor 32 llama3",
    ),
    "redundant qkv bias": (dict(add_qkv_bias=True), 1, "--add-qkv-bias --disable-bias-linear"),
    "odd rope": (dict(position_embedding_type="rope", kv_channels=63), 1, "rope 63"),
    "positions": (dict(seq_length=2048, max_position_embeddings=1024), 1, "2048 1024"),
    "heads of tp": (dict(tensor_model_parallel_size=8), 8, "--num-attention-heads 12 --tp 8"),
    "groups of tp": (
        dict(num_query_groups=3, tensor_model_parallel_size=4),
        4,
        "--num-query-groups 3 --tp 4",
    ),
    "ffn of tp": (
        dict(ffn_hidden_size=1002, tensor_model_parallel_size=4),
        4,
        "--ffn-hidden-size 1002 --tp 4",
    ),
    "sp alone": (dict(sequence_parallel=True), 2, "--tp is 1"),
    "sp alone, one rank": (dict(sequence_parallel=True), 1, "--tp is 1"),
    "sequence of tp": (
        dict(sequence_parallel=True, seq_length=1022, tensor_model_parallel_size=4),
        4,
        "1022 --tp 4",
    ),
    "stages": (dict(num_layers=4, pipeline_model_parallel_size=5), 5, "--pp 5 --num-layers 4"),
    "a schedule of one stage": (
        dict(pipeline_schedule="zb-v"),
        1,
        "--pipeline-schedule zb-v one pipeline stage",
    ),
    "virtual stages of one rank": (
        dict(num_virtual_stages_per_pipeline_rank=2),
        1,
        "--num-virtual-stages-per-pipeline-rank 2 one pipeline stage",
    ),
    "two counts of stages": (
        PIPELINE
        | dict(num_virtual_stages_per_pipeline_rank=2, num_layers_per_virtual_pipeline_stage=3),
        2,
        "--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 3",
    ),
    "layers of a virtual stage": (
        PIPELINE | dict(num_layers_per_virtual_pipeline_stage=4),
        2,
        "--num-layers 12 --num-layers-per-virtual-pipeline-stage 4 --pp 2 8 layers",
    ),
    "layers of a virtual stage, with the embedding": (
        PIPELINE
        | dict(
            num_layers=11,
            num_layers_per_virtual_pipeline_stage=4,
            account_for_embedding_in_pipeline_split=True,
        ),
        2,
        "--num-layers 11 and 1 more for embedding and loss "
        "--num-layers-per-virtual-pipeline-stage 4 --pp 2 8 layers",
    ),
    "stages of 1f1b": (
        PIPELINE | dict(pipeline_schedule="1f1b", num_virtual_stages_per_pipeline_rank=2),
        2,
        "--pipeline-schedule 1f1b 1 stage not --num-virtual-stages-per-pipeline-rank 2",
    ),
    "stages of zb-v": (
        PIPELINE | dict(pipeline_schedule="zb-v", num_layers_per_virtual_pipeline_stage=2),
        2,
        "--pipeline-schedule zb-v 2 stages not --num-layers-per-virtual-pipeline-stage 2 makes 3",
    ),
    "stages of interleaved": (
        PIPELINE | dict(pipeline_schedule="interleaved", num_virtual_stages_per_pipeline_rank=1),
        2,
        "--pipeline-schedule interleaved 2 stages or more",
    ),
    "more virtual stages than layers": (
        dict(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=4),
        4,
        "--pipeline-schedule interleaved 4 stages --pp 4 16 --num-layers 12",
    ),
    "more stages of a V than layers": (
        dict(pipeline_model_parallel_size=8, pipeline_schedule="zb-v"),
        8,
        "--pipeline-schedule zb-v 2 stages --pp 8 16 --num-layers 12",
    ),
    "fewer layers than ranks of a V": (
        dict(num_layers=2, pipeline_model_parallel_size=4, pipeline_schedule="zb-v"),
        4,
        "--pipeline-schedule zb-v 2 stages --pp 4 8 --num-layers 2",
    ),
    "groups of 1f1b": (
        PIPELINE | dict(microbatch_group_size_per_virtual_pipeline_stage=2, global_batch_size=8),
        2,
        "--microbatch-group-size-per-virtual-pipeline-stage 2 interleaved",
    ),
    "small groups": (
        INTERLEAVED | dict(microbatch_group_size_per_virtual_pipeline_stage=1),
        2,
        "--microbatch-group-size-per-virtual-pipeline-stage 1 --pp 2",
    ),
    "large groups": (
        INTERLEAVED | dict(microbatch_group_size_per_virtual_pipeline_stage=9),
        2,
        "--microbatch-group-size-per-virtual-pipeline-stage 9 8 microbatches",
    ),
    "memory for one schedule": (
        PIPELINE | dict(memory_limit_gib=80.0, pipeline_schedule="1f1b"),
        2,
        "--memory-limit-gib 80 --pipeline-schedule auto",
    ),
    "memory for none": (
        PIPELINE | dict(memory_limit_gib=0.1, pipeline_schedule="auto", global_batch_size=8),
        2,
        "--memory-limit-gib 0.1 every schedule GiB",
    ),
    "stages of one rank": (
        dict(pipeline_split=("12",)),
        1,
        "--pipeline-split 12 no effect one pipeline stage",
    ),
    "idle first rank": (
        dict(decoder_first_pipeline_num_layers=2),
        1,
        "--decoder-first-pipeline-num-layers 2 no effect",
    ),
    "idle account": (
        dict(account_for_loss_in_pipeline_split=True),
        1,
        "--account-for-loss-in-pipeline-split no effect",
    ),
    "split in two ways": (
        PIPELINE | dict(pipeline_split=("6,6",), decoder_last_pipeline_num_layers=6),
        2,
        "--pipeline-split 6,6 --decoder-last-pipeline-num-layers 6 2 ways",
    ),
    "split in three ways": (
        PIPELINE
        | dict(pipeline_split=("6,6",), decoder_last_pipeline_num_layers=6)
        | dict(account_for_loss_in_pipeline_split=True),
        2,
        "--pipeline-split --account-for-loss-in-pipeline-split 3 ways",
    ),
    "given end and account": (
        PIPELINE
        | dict(num_layers=11, decoder_first_pipeline_num_layers=4)
        | dict(account_for_loss_in_pipeline_split=True),
        2,
        "--decoder-first-pipeline-num-layers 4 --account-for-loss-in-pipeline-split",
    ),
    "words of a split": (PIPELINE | dict(pipeline_split=("6", "x")), 2, "--pipeline-split 6,x 'x'"),
    "a stage without layers": (PIPELINE | dict(pipeline_split=("12,0",)), 2, "12,0 '0'"),
    "too many of a split": (
        PIPELINE | dict(pipeline_split=("4,4,4",)),
        2,
        "4,4,4 3 numbers 2 stages --pp 2",
    ),
    "sum of a split": (
        PIPELINE | dict(pipeline_split=("6,7",)),
        2,
        "--pipeline-split 6,7 13 --num-layers 12",
    ),
    "rest of a given end": (
        dict(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=3),
        3,
        "--decoder-first-pipeline-num-layers 3 --num-layers 12 9 2",
    ),
    "no rest of given ends": (
        dict(pipeline_model_parallel_size=3)
        | dict(decoder_first_pipeline_num_layers=8, decoder_last_pipeline_num_layers=7),
        3,
        "--decoder-first-pipeline-num-layers 8 --decoder-last-pipeline-num-layers 7 12",
    ),
    "sum of given ends": (
        PIPELINE | dict(decoder_first_pipeline_num_layers=5, decoder_last_pipeline_num_layers=6),
        2,
        "first 5 last 6 --num-layers 12",
    ),
    "account does not divide": (
        PIPELINE | dict(account_for_embedding_in_pipeline_split=True),
        2,
        "--account-for-embedding-in-pipeline-split 12 13 2 --pp 2",
    ),
    "ranks": (
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        6,
        "6 ranks --tp 2 --pp 2",
    ),
    "one rank": (dict(tensor_model_parallel_size=4), 1, "1 rank cannot"),
    "replicas": (dict(check_replicas=5), 1, "--check-replicas 5 one rank"),
    "one rank sends nothing": (dict(log_communication=True), 1, "--log-communication one rank"),
    "backend": (dict(device="cpu", distributed_backend="nccl"), 1, "nccl cpu"),
    "batch": (dict(global_batch_size=18, micro_batch_size=4), 3, "18 4 3 12"),
    "recompute forms": (
        dict(recompute_granularity="full", recompute_activations=True),
        1,
        "selective full",
    ),
    "recompute layers": (
        dict(recompute_granularity="full", recompute_num_layers=7, pipeline_model_parallel_size=2),
        2,
        "7 6 layers",
    ),
    "precisions": (dict(bf16=True, precision="fp64"), 1, "--bf16 fp64"),
    "apex of lion": (dict(optimizer="lion", optimizer_backend="torch"), 1, "adam or muon"),
    "adam of lion": (dict(optimizer="lion", adam_beta1=0.8), 1, "--adam-beta1 adam or muon"),
    "lion of adam": (dict(lion_beta1=0.8), 1, "--lion-beta1 --optimizer lion"),
    "muon of adam": (dict(muon_nesterov=True), 1, "--muon-nesterov --optimizer muon"),
    "decoupled minimum alone": (dict(decoupled_min_lr=1e-5), 1, "--decoupled-lr"),
    "decoupled rates": (
        dict(decoupled_lr=1e-4, decoupled_min_lr=1e-3),
        1,
        "--decoupled-min-lr 0.001 --decoupled-lr 0.0001",
    ),
    "decoupled warm-up": (
        dict(lr_warmup_iters=2, lr_warmup_init=2e-4, decoupled_lr=1e-4),
        1,
        "--lr-warmup-init 0.0002 --decoupled-lr 0.0001",
    ),
    "decoupled rate of what is frozen": (
        dict(decoupled_lr=1e-4, parameter_groups=("embedding.* freeze",)),
        1,
        "--decoupled-lr 0.0001 no effect --parameter-groups",
    ),
    "muon of what is frozen": (
        dict(optimizer="muon", muon_nesterov=True, parameter_groups=("layers.* freeze",)),
        1,
        "--muon-nesterov no effect --parameter-groups",
    ),
    "everything frozen": (dict(parameter_groups=("* freeze",)), 1, "freezes every parameter"),
    "half precisions": (dict(bf16=True, fp16=True), 1, "--bf16 --fp16"),
    "a decay of no length": (
        dict(lr_decay_style="WSD"),
        1,
        "--lr-decay-style WSD --lr-wsd-decay-iters",
    ),
    "a decay that is too long": (
        dict(lr_decay_style="WSD", lr_wsd_decay_iters=10**7),
        1,
        "--lr-wsd-decay-iters 10000000",
    ),
    "a warm-up that falls": (
        dict(lr_warmup_iters=2, lr_warmup_init=1.0),
        1,
        "--lr-warmup-init 1 --lr",
    ),
    "a weight decay without ends": (
        dict(weight_decay_incr_style="cosine"),
        1,
        "--weight-decay-incr-style cosine --start-weight-decay --end-weight-decay",
    ),
    "loss scales": (
        dict(fp16=True, min_loss_scale=8.0, initial_loss_scale=4.0),
        1,
        "--min-loss-scale 8 --initial-loss-scale 4",
    ),
    "min lr": (dict(min_lr=1e-3), 1, "--min-lr 0.001 --lr 0.0003"),
    "warm-up twice": (dict(lr_warmup_iters=2, lr_warmup_fraction=0.1), 1, "0.1 2"),
    "warm-up past decay": (dict(lr_warmup_iters=8, lr_decay_iters=5), 1, "8 5"),
    "warm-up past end": (
        dict(lr_warmup_iters=10, lr_decay_style="constant"),
        1,
        "--lr-warmup-iters 10",
    ),
    "fused attention with dropout": (
        dict(attention_backend="sdpa"),
        1,
        "sdpa --attention-dropout 0.1 --rng-scheme global",
    ),
    "fused softmax with streams": (
        dict(attention_backend="fused-softmax", rng_scheme="megatron"),
        1,
        "fused-softmax --attention-dropout 0.1 --rng-scheme megatron",
    ),
    "no length": (dict(train_iters=None), 1, "--train-iters --train-samples --train-tokens"),
    "two lengths": (dict(train_samples=20), 1, "20 10"),
    "samples and tokens": (
        dict(train_iters=None, train_samples=20, train_tokens=20480),
        1,
        "--train-samples 20 --train-tokens 20480",
    ),
    "tokens of iterations": (dict(train_tokens=20480), 1, "--train-tokens 20480 20 10"),
    "samples of a ramp": (
        dict(train_iters=None, train_samples=22, **RAMP),
        1,
        "--train-samples 22 --rampup-batch-size",
    ),
    "words of a ramp": (RAMP | {"rampup_batch_size": ("4", "x")}, 1, "4 x three whole numbers"),
    "a ramp past its end": (
        RAMP | {"rampup_batch_size": ("4", "5", "60")},
        1,
        "--rampup-batch-size 4 5 60 --global-batch-size 16 16 - 4",
    ),
    "a ramp that starts above its end": (
        RAMP | {"rampup_batch_size": ("24", "4", "60")},
        1,
        "--rampup-batch-size 24 4 60 starts above --global-batch-size 16",
    ),
    "a ramp whose words are all too large": (
        RAMP | {"rampup_batch_size": ("32", "16", "60")},
        1,
        "--rampup-batch-size 32 16 60",
    ),
    "a ramp that starts at its end": (
        RAMP | {"rampup_batch_size": ("16", "4", "60")},
        1,
        "--rampup-batch-size 16 4 60 no effect",
    ),
    "a ramp in one text": (
        RAMP | {"rampup_batch_size": ("4 5 60",)},
        1,
        "--rampup-batch-size 4 5 60 does not lead",
    ),
    "a ramp that no ranks can have, with samples": (
        dict(rampup_batch_size=("2", "2", "40"), train_iters=None, train_samples=98),
        8,
        "--rampup-batch-size 2 2 40 --micro-batch-size 1 data-parallel size 8",
    ),
    "samples in batches that ranks do not divide": (
        dict(global_batch_size=7, train_iters=None, train_samples=98),
        4,
        "--global-batch-size 7",
    ),
    "a ramp that ranks do not divide": (
        RAMP | {"rampup_batch_size": ("2", "2", "60")},
        4,
        "--rampup-batch-size 2 2 60 --micro-batch-size 1 data-parallel size 4",
    ),
    "two units of a schedule": (
        dict(lr_decay_samples=10, lr_warmup_iters=2),
        1,
        "--lr-warmup-iters 2",
    ),
    "warm-up past the samples": (
        dict(lr_warmup_samples=12, lr_decay_samples=12),
        1,
        "--lr-warmup-samples 12 sample 12",
    ),
    "samples of a decay": (
        dict(lr_decay_style="WSD", lr_wsd_decay_samples=12),
        1,
        "--lr-wsd-decay-samples 12 10 samples",
    ),
    "idle comparison of norms": (
        dict(skip_grad_norm_above=3.0),
        1,
        "--skip-grad-norm-above 3 --max-bad-steps 0",
    ),
    "samples of batch": (dict(train_iters=None, train_samples=99, global_batch_size=8), 1, "99 8"),
    "no data": (dict(mock_data=False), 1, "--data-path --mock-data"),
    "mock vocabulary": (dict(vocab_size=None), 1, "--vocab-size"),
    "mock vocabulary of one": (dict(vocab_size=1), 1, "--vocab-size 1"),
    "idle rotary base": (dict(rotary_base=5e5), 1, "--rotary-base 500000 rope"),
    "idle recompute method": (dict(recompute_method="block"), 1, "--recompute-method block full"),
    "idle recompute layers": (dict(recompute_num_layers=2), 1, "--recompute-num-layers 2 full"),
    "idle momentum": (dict(sgd_momentum=0.5), 1, "--sgd-momentum 0.5 sgd"),
    "idle beta": (dict(optimizer="sgd", adam_beta2=0.95), 1, "--adam-beta2 0.95 adam"),
    "idle min lr": (dict(lr_decay_style="constant", min_lr=1e-5), 1, "--min-lr 1e-05 constant"),
    "idle decay": (
        dict(lr_decay_style="constant", lr_decay_iters=5),
        1,
        "--lr-decay-iters 5 constant",
    ),
    "profile": (dict(profile="12-10"), 1, "--profile 12-10 ascending"),
    "profile words": (dict(profile="10"), 1, "--profile 10 first-last"),
    "profile twice": (dict(profile="2-5,4-6"), 1, "--profile 2-5,4-6 ascending"),
    "profile ranks": (
        dict(profile="2-5", profile_ranks=("0", "8", "x")),
        2,
        "--profile-ranks 8 x 0 to 1",
    ),
    "trace": (dict(trace="x", trace_iterations="4"), 1, "--trace-iterations 4 first-last"),
    "long trace": (
        dict(trace="x", trace_iterations="1-101", train_iters=500),
        1,
        "--trace-iterations 1-101 100",
    ),
    "late trace": (
        dict(trace="x", trace_iterations="11-12"),
        1,
        "--trace-iterations 11-12 10 iterations",
    ),
    "idle trace iterations": (
        dict(trace_iterations="2-3"),
        1,
        "--trace-iterations without --trace",
    ),
    "idle profile ranks": (dict(profile_ranks=("1",)), 2, "--profile-ranks 1 without --profile"),
    "idle profile folder": (dict(profile_dir="x"), 1, "--profile-dir x without --profile"),
    "idle name": (dict(wandb_exp_name="x"), 1, "--wandb-exp-name x without --wandb-project"),
    "idle watchdog": (
        dict(hang_timeout=900.0),
        1,
        "--hang-timeout 900 --distributed-timeout-minutes",
    ),
    "no time": (dict(hang_timeout=-1.0), 1, "--hang-timeout -1 at least 0"),
    "idle save interval": (dict(save_interval=5), 1, "--save-interval 5 without --save"),
    "idle keep last": (dict(keep_last=5), 1, "--keep-last 5 without --save"),
    "idle async save": (dict(async_save=True), 1, "--async-save without --save"),
    "idle keep every": (dict(keep_every=5), 1, "--keep-every 5 without --save"),
    "idle fallback": (dict(load_fallback=True), 1, "--load-fallback without --load"),
    "idle verification": (
        dict(verify_checkpoint="off"),
        1,
        "--verify-checkpoint off without --load or --pretrained-checkpoint",
    ),
    "idle step": (dict(ckpt_step=0), 1, "--ckpt-step 0 without --load"),
    "idle finetune": (dict(finetune=True), 1, "--finetune without --load"),
    "idle no-load": (dict(no_load_optim=True), 1, "--no-load-optim without --load"),
    "idle no-load of streams": (
        dict(no_load_rng=True, load="unmade", save="unmade"),
        1,
        "--no-load-rng --rng-scheme global",
    ),
    "idle scheme": (
        dict(rng_scheme="megatron", hidden_dropout=0.0, attention_dropout=0.0),
        1,
        "megatron dropout",
    ),
    "idle model": (dict(tokenizer_model="x.model"), 1, "--tokenizer-model x.model"),
    "idle order": (dict(sample_order="megatron"), 1, "--sample-order megatron --mock-data"),
    "idle change of data": (dict(allow_data_change=True), 1, "--allow-data-change without --load"),
    "idle omission": (dict(no_save_optim=True), 1, "--no-save-optim without --save"),
    "idle omission of streams": (
        dict(no_save_rng=True, save="unmade"),
        1,
        "--no-save-rng --rng-scheme global",
    ),
    "idle exit": (
        dict(exit_on_missing_checkpoint=True),
        1,
        "--exit-on-missing-checkpoint without --load",
    ),
    "idle change of model": (
        dict(allow_model_change=True),
        1,
        "--allow-model-change without --load or --pretrained-checkpoint",
    ),
    "idle arguments": (
        dict(use_checkpoint_args=True),
        1,
        "--use-checkpoint-args without --load or --pretrained-checkpoint",
    ),
    "idle vocabulary": (
        dict(vocab_file="x.txt"),
        1,
        "--vocab-file x.txt GPT2BPETokenizer BertWordPieceCase",
    ),
    "idle merges": (dict(merge_file="x.txt"), 1, "--merge-file x.txt GPT2BPETokenizer"),
    "idle split": (dict(split="1,1,1"), 1, "--split 1,1,1 --mock-data"),
    "post-norm of a GPT": (dict(norm_placement="post"), 1, "--norm-placement post BERT"),
    "idle masks": (dict(mask_prob=0.2), 1, "--mask-prob 0.2 GPT"),
    "idle pairs": (dict(bert_pair="none"), 1, "--bert-pair none GPT"),
    "idle gelu": (dict(swiglu=True, gelu="erf"), 1, "--gelu erf --swiglu"),
    "idle order of a BERT": (
        BERT | dict(sample_order="megatron"),
        1,
        "--sample-order megatron BERT",
    ),
    "idle documents of a BERT": (BERT | dict(eod_mask_loss=True), 1, "--eod-mask-loss BERT"),
    "no room": (BERT | dict(seq_length=4), 1, "--seq-length 4"),
    "mock vocabulary of a BERT": (BERT | dict(vocab_size=5), 1, "--vocab-size 5 4 special"),
    "mask all": (BERT | dict(mask_prob=1.5), 1, "--mask-prob 1.5 at most 1"),
    "shorten all": (BERT | dict(short_seq_prob=-0.5), 1, "--short-seq-prob -0.5 at least 0"),
    "idle evaluations": (
        dict(eval_iters=20, eval_interval=0),
        1,
        "--eval-iters 20 --eval-interval 0",
    ),
    "idle evaluation interval": (
        dict(eval_iters=0, eval_interval=20),
        1,
        "--eval-interval 20 --eval-iters 0",
    ),
}
