"""Which of the Trainer's arguments the training scripts offer, and the order of --help.

The libraries bring some 120 arguments.  Here those are offered that work in a stage (tests/test_every_argument.py tries each
one); the others fail, do nothing, or take back a promise of this toolkit, and are refused with what to do instead.
"""

import os

EVERY_STAGE = (
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "fp16 tf32 activation_checkpointing log_level disable_tqdm report_to run_name project eval_strategy eval_steps "
    "eval_delay eval_on_start per_device_eval_batch_size save_strategy save_total_limit resume_from_checkpoint seed "
    "data_seed full_determinism use_cpu ddp_timeout local_rank"
)
# What counts in batches of rows, of which PPO has none.
FIRST_STAGES = (
    "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps logging_strategy logging_steps "
    "logging_first_step save_steps load_best_model_at_end metric_for_best_model greater_is_better dataloader_drop_last "
    "train_sampling_strategy"
)

# What to do in the place of an argument that is not offered, in the words that follow it in the error.
_COLUMNS = "rows are tokenized by this toolkit, by their column names; see the table in README.md"
_ALL_REPLIES = "each row is one prompt and one reply, and the loss is on the reply"
_LOADED = "the rows are tokenized before the training, and nothing is left to load"
_UPLOAD = "upload the finished folder with `hf upload REPOSITORY FOLDER`"
_LAUNCH = "start the script with `accelerate launch --config_file configs/accelerate/FILE.yaml`"
_WHOLE = "a checkpoint holds all that a run needs to go on; --save_total_limit keeps few of them"
INSTEAD = {
    "gradient_checkpointing": "it is called --activation_checkpointing",
    "packing": _ALL_REPLIES + "; rows of similar length share a pass, so there is little padding",
    "padding_free": "rows of similar length share a pass, so there is little padding",
    "assistant_only_loss": _ALL_REPLIES,
    "completion_only_loss": _ALL_REPLIES,
    "eos_token": "set it in the tokenizer of the base model's folder, so that all stages have the same",
    "pad_token": "padding is told by masks; the tokenizer's own pad token is used, or another one in its place",
    "chat_template_path": "save the template with the base model's tokenizer, so that all stages have the same",
    "truncation_mode": "a long reply is cut at its end, and a prompt never",
    "dataset_text_field": _COLUMNS,
    "remove_unused_columns": _COLUMNS,
    "length_column_name": _COLUMNS,
    "dataset_kwargs": _COLUMNS,
    "dataset_num_proc": _COLUMNS,
    "model_init_kwargs": "give --dtype, --load_in_4bit or --trust_remote_code",
    "dataloader_num_workers": _LOADED,
    "dataloader_prefetch_factor": _LOADED,
    "dataloader_persistent_workers": _LOADED,
    "dataloader_pin_memory": "it is on where there is a GPU",
    "label_smoothing_factor": "the losses of this toolkit have no smoothed form",
    "group_by_length": "give --train_sampling_strategy group_by_length",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_token": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "deepspeed": _LAUNCH,
    "auto_find_batch_size": "--plan true says what fits",
    "save_only_model": _WHOLE,
    "ignore_data_skip": "a resumed run gives the numbers of one that was not interrupted",
    "do_train": "the script always trains",
    "do_eval": "give --eval_strategy steps",
    "do_predict": "give --eval_strategy steps",
    "prediction_loss_only": "an evaluation measures all there is",
    "load_best_model_at_end": "the guard keeps the best policy in best/",
    "metric_for_best_model": "the guard keeps the best policy in best/",
    "greater_is_better": "the guard keeps the best policy in best/",
    "logging_steps": "every iteration is logged",
    "logging_strategy": "every iteration is logged",
    "logging_first_step": "every iteration is logged",
    "max_steps": "use --steps",
    "num_train_epochs": "use --steps",
    "save_steps": "use --save_freq",
    "per_device_train_batch_size": "use --batch_size",
    "neftune_noise_alpha": "noise is for SFT alone",
}

# Sections of --help, in this order; what is in none of them is the Trainer's, and comes last.
SECTIONS = {
    "what to train": "model_name_or_path prompt_template dtype load_in_4bit trust_remote_code sft_model_lora_path "
    "reward_model_lora_path init_from_sft reward_model reward_dtype reward_load_in_4bit reward_device reward_card "
    "card_only reward_server "
    "reward_function reward_weights merged_sft_model_path critic ensemble_size ensemble_penalty plan",
    "on what": "dataset columns dataset_split dataset_data_dir eval_dataset eval_dataset_split eval_dataset_data_dir "
    "eval_fraction prompt_date max_length train_on_turns train_subset eval_subset overlong_pairs",
    "LoRA": "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters use_rslora use_dora "
    "init_lora_weights",
    "reward model": "center_rewards_coefficient length_penalty_coefficient degenerate_ratio degenerate_kinds exempt_probes "
    "probe_prompts",
    "training": "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps bf16 "
    "activation_checkpointing max_nonfinite_steps seed",
    "PPO": "advantage replies_per_prompt divide_by_std kl_in steps batch_size mini_batch_size ppo_epochs adafactor "
    "output_max_length temperature repetition_penalty begin_suppress_tokens batched_gen init_kl_coef adap_kl_ctrl "
    "adap_kl_target adap_kl_horizon early_stopping target_kl reward_baseline normalize_scores score_clip "
    "missing_eos_penalty allow_weak_reward floor_broken_replies gamma gae_lambda clip_range value_clip_range value_coef "
    "value_learning_rate value_warmup_iterations",
    "guard": "guard guard_freq guard_prompts guard_patience kl_budget",
    "saving": "output_dir save_freq save_strategy save_steps save_total_limit resume_from_checkpoint",
    "logging": "logging_steps log_with report_to gold_function eval_strategy eval_steps per_device_eval_batch_size",
}

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
OF_BITSANDBYTES = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
# Schedules that follow the evaluations, whose figures differ from stage to stage.
NO_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

# Arguments, what they need in order to have an effect, and whether that is so.
NEEDS = (
    ("eval_steps", "--eval_strategy steps", lambda args: args.eval_strategy == "steps"),
    ("eval_delay", "an --eval_strategy", lambda args: args.eval_strategy != "no"),
    ("save_steps save_freq", "--save_strategy steps", lambda args: args.save_strategy == "steps"),
    ("save_total_limit", "a --save_strategy", lambda args: args.save_strategy != "no"),
    ("logging_steps", "--logging_strategy steps", lambda args: args.logging_strategy == "steps"),
    ("num_train_epochs", "leaving out --max_steps", lambda args: args.max_steps == -1),
    (
        "metric_for_best_model greater_is_better",
        "--load_best_model_at_end true or --save_strategy best",
        lambda args: args.load_best_model_at_end or args.save_strategy == "best",
    ),
    ("adam_beta1 adam_beta2 adam_epsilon", "an AdamW for --optim", lambda args: "adamw" in args.optim),
    ("warmup_steps", "another --lr_scheduler_type", lambda args: args.lr_scheduler_type != "constant"),
    ("run_name", "a tracker, such as --report_to wandb", lambda args: args.report_to),
    ("project", "--report_to trackio", lambda args: "trackio" in args.report_to),
    ("eval_fraction", "leaving out --eval_dataset", lambda args: args.eval_dataset is None),
    ("eval_dataset_split eval_dataset_data_dir", "--eval_dataset", lambda args: args.eval_dataset is not None),
    (
        "dataset_split dataset_data_dir",
        "a --dataset that has splits or folders",
        lambda args: args.dataset is None or not os.path.isfile(args.dataset),
    ),
    ("degenerate_kinds", "a --degenerate_ratio above 0", lambda args: args.degenerate_ratio > 0),
    (
        "output_max_length",
        "--sft_model_lora_path",
        lambda args: getattr(args, "sft_model_lora_path", "") is not None,
    ),  # stage 2
    (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters use_rslora use_dora init_lora_weights",
        "leaving out --init_from_sft, which takes the SFT adapter's shape",
        lambda args: not getattr(args, "init_from_sft", False),
    ),
    (
        "reward_dtype reward_load_in_4bit reward_device reward_card",
        "--reward_model",
        lambda args: args.reward_model is not None,
    ),
    (
        "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lora_r lora_alpha "
        "lora_dropout lora_target_modules ensemble_size degenerate_ratio center_rewards_coefficient sft_model_lora_path "
        "init_from_sft prompt_template plan",
        "leaving out --card_only, which trains nothing",
        lambda args: not getattr(args, "card_only", False),
    ),
    ("ensemble_penalty", "an --ensemble_size above 1", lambda args: args.ensemble_size > 1),
    (
        "critic gamma gae_lambda value_clip_range value_coef value_learning_rate value_warmup_iterations",
        "--advantage gae",
        lambda args: args.advantage == "gae",
    ),
    ("divide_by_std", "--advantage grpo", lambda args: args.advantage == "grpo"),
    ("adap_kl_target adap_kl_horizon", "--adap_kl_ctrl true", lambda args: args.adap_kl_ctrl),
    ("target_kl", "--early_stopping true", lambda args: args.early_stopping),
    ("guard_freq guard_prompts guard_patience kl_budget", "a --guard", lambda args: args.guard != "off"),
)
