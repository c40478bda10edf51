"""The mutations: for every trap a fix to remove and the test that must then fail, or why the trap cannot occur."""

from typing import Final

from tests.mutants.mutation import Mutation

_TRAINER: Final = "trainer_image/qlora_trainer"
_TESTS: Final = "tests/unit/trainer"

MUTATIONS: Final = (
    Mutation(
        trap=1,
        file=f"{_TRAINER}/training/engine.py",
        old="        torch.autograd.backward(loss)\n",
        new="        torch.autograd.backward(loss / weight / len(batch.labels))\n",
        test=f"{_TESTS}/parity/test_parity.py::test_gradient_accumulation_of_1_x_16_is_16_x_1",
    ),
    Mutation(
        trap=1,
        file=f"{_TRAINER}/training/engine.py",
        old="        torch.autograd.backward(loss)\n",
        new="        torch.autograd.backward(loss / weight / len(batch.labels))\n",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_01_micro_batches_do_not_change_a_step",
    ),
    Mutation(
        trap=2,
        file=f"{_TRAINER}/training/loop.py",
        old="        labels = sum(row.label_count for row in window)\n",
        new="        labels = sum(row.label_count for row in window[self.world.rank :: self.world.size]) or 1\n",
        test=f"{_TESTS}/distributed/test_two_processes.py::test_trap_02_two_processes_equal_one_with_the_same_global_batch",
    ),
    Mutation(
        trap=3,
        file=f"{_TRAINER}/data/batching.py",
        old="_label_positions(row, number * width)\n",
        new="_label_positions(row, number * width) if ids[number][position - number * width + 1] != 1\n",
        test=f"{_TESTS}/data/test_traps_data.py::test_trap_03_end_token_is_a_label_although_it_is_also_the_padding_token",
    ),
    Mutation(
        trap=4,
        file=f"{_TRAINER}/data/tokenization.py",
        old="rows.append(TokenRow(ids, ((first, len(ids)),)",
        new="rows.append(TokenRow(ids, ((first, len(ids) - 1),)",
        test=f"{_TESTS}/data/test_traps_data.py::test_trap_04_last_token_of_a_row_is_the_end_token_and_a_label",
    ),
    Mutation(
        trap=4,
        file=f"{_TRAINER}/data/answer_spans.py",
        old="    if not stop_token:\n        return turn\n",
        new="    if stop_token:\n        return turn\n",
        test=f"{_TESTS}/data/test_traps_data.py::test_trap_04_assistant_turns_are_labels_up_to_their_stop_token",
    ),
    Mutation(
        trap=4,
        file=f"{_TRAINER}/evaluation/generation.py",
        old="    named = own if isinstance(own, list) else [own]\n",
        new="    named: list[int] = []\n",
        test=f"{_TESTS}/publishing/test_traps_result.py::test_trap_4_answer_ends_at_any_eos_token_of_the_model",
    ),
    Mutation(
        trap=4,
        file=f"{_TRAINER}/evaluation/generation.py",
        old=", *named, end_of_turn_token(tokenizer))",
        new=", *named)",
        test=f"{_TESTS}/publishing/test_traps_result.py::test_trap_4_answer_ends_at_the_turn_end_token_of_the_template",
    ),
    Mutation(
        trap=5,
        file=f"{_TRAINER}/data/tokenization.py",
        old="return ids[1:] if start is not None and ids[:2] == [start, start] else ids",
        new="return ids",
        test=f"{_TESTS}/data/test_traps_data.py::test_trap_05_row_has_one_start_token_with_or_without_one_in_its_text",
    ),
    Mutation(
        trap=6,
        file=f"{_TRAINER}/data/tokenization.py",
        old="max(common_prefix_length(prompt, text), 1)",
        new="len(prompt)",
        test=f"{_TESTS}/data/test_traps_data.py::test_trap_06_token_across_prompt_and_answer_is_a_label",
    ),
    Mutation(
        trap=7,
        file=f"{_TRAINER}/data/row_encoder.py",
        old=" or row.label_count == 0\n",
        new="\n",
        test=f"{_TESTS}/data/test_traps_data.py::test_trap_07_row_with_truncated_answer_is_dropped",
    ),
    Mutation(
        trap=8,
        file=f"{_TRAINER}/model/base_model.py",
        old=', "use_cache": False}\n',
        new="}\n",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_08_batched_rows_have_the_loss_of_single_rows",
    ),
    Mutation(
        trap=8,
        file=f"{_TRAINER}/data/batching.py",
        old="position_ids=torch.tensor([positions], device=device),",
        new="position_ids=None,",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_08_batched_rows_have_the_loss_of_single_rows",
    ),
    Mutation(
        trap=10,
        file=f"{_TRAINER}/model/base_model.py",
        old="    model.requires_grad_(False)\n    return model\n",
        new="    from peft import prepare_model_for_kbit_training\n    return prepare_model_for_kbit_training(model)\n",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_10_base_is_not_upcast_and_adapter_is_fp32",
    ),
    Mutation(
        trap=11,
        file=f"{_TRAINER}/training/health.py",
        old="if gradient is None or (",
        new="if gradient is not None and (",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_11_missing_gradients_end_the_run",
    ),
    Mutation(
        trap=12,
        file=f"{_TRAINER}/model/base_model.py",
        old='"use_reentrant": False',
        new='"use_reentrant": True',
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_12_activations_are_recomputed_without_reentry",
    ),
    Mutation(
        trap=13,
        file=f"{_TRAINER}/model/base_model.py",
        old="            bnb_4bit_quant_type=quantization.type,\n",
        new="",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_13_4_bit_weights_equal_the_base_and_do_not_change",
    ),
    Mutation(
        trap=17,
        file=f"{_TRAINER}/publishing/merge_weights.py",
        old="dequantized.get(name, weight.data).float()",
        new="dequantized.get(name, weight.data)",
        test=f"{_TESTS}/publishing/test_traps_result.py::test_trap_17_small_update_survives_the_merge",
    ),
    Mutation(
        trap=18,
        file=f"{_TRAINER}/model/adapter.py",
        old="ensure_weight_tying=trains_tied_weight(base, modules_to_save)",
        new="ensure_weight_tying=False",
        test=f"{_TESTS}/model/test_adapter.py::test_modules_to_save_are_trained_in_fp32_and_come_back",
        fails_with="UserWarning",  # peft's: a tied weight would be trained as one of two
    ),
    Mutation(
        trap=18,
        file=f"{_TRAINER}/inference/multi_adapter_chat.py",
        old="    if settings.ensure_weight_tying and ties:\n",
        new="    if settings.ensure_weight_tying and ties and not ties:\n",
        test=f"{_TESTS}/inference/test_multi_adapter_chat.py::test_each_adapter_answers_as_when_loaded_alone",
        fails_with="UserWarning",  # peft's: it finds nothing that shares the embedding's weight
    ),
    Mutation(
        trap=19,
        file=f"{_TRAINER}/publishing/publish.py",
        old="trainable.wrapped.save_pretrained(target, save_embedding_layers=False, **state_dict)",
        new="trainable.wrapped.save_pretrained(target, **state_dict)",
        test=f"{_TESTS}/publishing/test_traps_result.py::test_trap_19_saving_sends_no_request_to_the_hub",
    ),
    Mutation(
        trap=20,
        file=f"{_TRAINER}/publishing/publish.py",
        old='    config["base_model_name_or_path"] = uri.removeprefix("hf://").removeprefix("file://")\n',
        new="",
        test=f"{_TESTS}/publishing/test_traps_result.py::test_trap_20_adapter_has_no_local_path",
    ),
    Mutation(
        trap=21,
        file=f"{_TRAINER}/training/engine.py",
        old="enabled=settings.dtype == torch.float16)",
        new="enabled=False)",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_21_fp16_scales_gradients_and_adapter_stays_fp32",
    ),
    Mutation(
        trap=22,
        file=f"{_TRAINER}/training/health.py",
        old="    if math.isfinite(record.loss) and (scaling or",
        new="    if scaling or (math.isfinite(record.loss) and",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_22_fp16_that_overflows_ends_the_run",
    ),
    Mutation(
        trap=23,
        file="operator/qlora_api/accelerators.py",
        old="else capability >= self.native_bf16",
        new="else True",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_23_a_t4_computes_in_fp16_with_sdpa",
    ),
    Mutation(
        trap=24,
        file=f"{_TRAINER}/model/adapter.py",
        old="parameter.data = parameter.data.float()",
        new="parameter.data = parameter.data.bfloat16()",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_24_dora_magnitudes_train_with_bf16",
    ),
    Mutation(
        trap=25,
        file=f"{_TRAINER}/model/adapter.py",
        old="parameter.data = parameter.data.float()",
        new="parameter.data = parameter.data.bfloat16()",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_25_updates_far_below_the_precision_of_bf16_add_up",
    ),
    Mutation(
        trap=26,
        file=f"{_TRAINER}/training/health.py",
        old="    if math.isfinite(record.loss) and (scaling or math.isfinite(record.grad_norm)):\n",
        new="    if scaling or math.isfinite(record.grad_norm):\n",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_26_non_finite_loss_ends_the_run_with_its_step",
    ),
    Mutation(
        trap=27,
        file=f"{_TRAINER}/data/batching.py",
        old="    return list(groups)\n",
        new="    return [[*group, *group[: size - len(group)]] for group in groups]\n",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_27_metrics_do_not_depend_on_batches",
    ),
    Mutation(
        trap=28,
        file=f"{_TRAINER}/data/batching.py",
        old="generator = torch.Generator().manual_seed((seed << 20) + epoch)",
        new="generator = None",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_28_row_order_depends_only_on_seed_and_epoch",
    ),
    Mutation(
        trap=29,
        file=f"{_TRAINER}/model/base_model.py",
        old="            module.support_avx512bf16_for_cpu = False\n",
        new="            pass\n",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_29_evaluation_does_not_change_later_gradients",
        fails_with="UserWarning",  # torch's: the packed weights' kernel has no gradient
        cpu="avx512_bf16",
    ),
    Mutation(
        trap=29,
        file=f"{_TRAINER}/model/base_model.py",
        old="with torch.random.fork_rng(devices=devices), torch.no_grad(), without:",
        new="with torch.no_grad(), without:",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_29_evaluating_restores_mode_and_random_numbers",
    ),
    Mutation(
        trap=29,
        file=f"{_TRAINER}/training/loop.py",
        old="        torch.manual_seed((training.seed << 30) + step * self.world.size + self.world.rank)\n",
        new="",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_29_dropout_does_not_depend_on_what_ran_before",
    ),
    Mutation(
        trap=30,
        file=f"{_TRAINER}/training/engine.py",
        old="        load_optimizer(self._optimizer, state.optimizer)\n",
        new="",
        test=f"{_TESTS}/training/test_checkpoint_store.py::test_trap_30_run_stopped_after_any_step_resumes_bit_for_bit",
    ),
    Mutation(
        trap=31,
        file=f"{_TRAINER}/publishing/publish.py",
        old="save_embedding_layers=False, **state_dict)",
        new="save_embedding_layers=False, state_dict=dict(list(trainable.wrapped.state_dict().items())[::2]))",
        test=f"{_TESTS}/publishing/test_traps_result.py::test_trap_31_saved_weights_equal_the_trained_ones",
    ),
    Mutation(
        trap=32,
        file=f"{_TRAINER}/model/base_model.py",
        old="    return TrainableModel(peft, peft.get_base_model(),",
        new="    return TrainableModel(torch.compile(peft), peft.get_base_model(),",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_32_nothing_is_compiled",
    ),
    Mutation(
        trap=34,
        file=f"{_TRAINER}/model/attention.py",
        old=(
            "    if facts.logit_softcapping:\n"
            '        return "eager", "the model caps attention scores, which SDPA cannot"\n'
            "    if not facts.sdpa:\n"
        ),
        new="    if facts.head_size < 1:\n",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_34_capped_scores_are_capped",
    ),
    Mutation(
        trap=36,
        file=f"{_TRAINER}/model/architecture.py",
        old="if _is_linear(each) and each is not output)",
        new="if _is_linear(each))",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_36_output_layer_never_gets_an_adapter",
    ),
    Mutation(
        trap=36,
        file=f"{_TRAINER}/model/base_model.py",
        old="        trainable = tuple(parameter for parameter in output.parameters() if parameter.requires_grad)\n",
        new="        trainable = ()\n",
        test=f"{_TESTS}/model/test_traps_model.py::test_trap_36_trainable_head_gets_the_gradients_of_torch",
        fails_with="AttributeError",  # a weight without a gradient
    ),
    Mutation(
        trap=37,
        file=f"{_TRAINER}/training/checkpoint_store.py",
        old="            check_fingerprint(record.course, self._fingerprint)\n",
        new="",
        test=f"{_TESTS}/training/test_checkpoint_store.py::test_trap_37_checkpoint_with_another_fingerprint_is_refused",
    ),
    Mutation(
        trap=38,
        file="requirements/trainer.txt",
        old="jinja2==",
        new="kernels==0.11.1\njinja2==",
        test="tests/contract/test_requirements.py::test_trap_38_nothing_of_the_image_downloads_kernels",
    ),
    Mutation(
        trap=39,
        file=f"{_TRAINER}/training/checkpoint_manifest.py",
        old='        return f"step-{self.step:06}-a{self.attempt}"\n',
        new='        return f"step-{self.step:06}-a1"\n',
        test=f"{_TESTS}/training/test_checkpoint_store.py::test_trap_39_overlapping_attempts_write_separate_folders",
    ),
    Mutation(
        trap=40,
        file=f"{_TRAINER}/watchdog.py",
        old="        if liveness.seconds_silent() > limit:\n",
        new="        if liveness.seconds_silent() < 0:\n",
        test=f"{_TESTS}/test_watchdog.py::test_trap_40_hung_process_is_ended_once",
    ),
    Mutation(
        trap=41,
        file=f"{_TRAINER}/publishing/publish.py",
        old="            output.put(path, source, if_none_match=True)\n",
        new="            output.put(path, source)\n",
        test=f"{_TESTS}/publishing/test_publish.py::test_trap_41_files_of_an_overwritten_result_are_never_replaced",
    ),
    Mutation(
        trap=42,
        file=f"{_TRAINER}/training/health.py",
        old="    if skipped == MAX_SKIPPED_STEPS:\n",
        new="    if skipped > MAX_SKIPPED_STEPS:\n",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_42_fp16_gradients_that_are_never_finite_end_the_run",
    ),
    Mutation(
        trap=43,
        file=f"{_TRAINER}/training/engine.py",
        old="{name: type(fresh[name])(value) for name, value in state.scaler.items()}",
        new="dict(state.scaler)",
        test=f"{_TESTS}/training/test_traps_loop.py::test_trap_43_fp16_run_resumes_like_an_uninterrupted_one",
        fails_with="TypeError",  # torch's: the growth interval must be an int
    ),
    Mutation(
        trap=44,
        file=f"{_TRAINER}/model/base_model.py",
        old="    check_weight_files(folder)\n",
        new="",
        test=f"{_TESTS}/model/test_weight_check.py::test_trap_44_broken_weights_are_never_loaded",
    ),
    Mutation(
        trap=45,
        file=f"{_TRAINER}/prepare.py",
        old="    check_stored_quantization(empty.config, spec)\n",
        new="",
        test=f"{_TESTS}/model/test_weight_check.py::test_trap_45_broken_weights_are_refused_in_preparation",
    ),
    Mutation(
        trap=46,
        file=f"{_TRAINER}/model/adapter.py",
        old="        exclude_modules=list(excluded_linear_modules(base)) or None,\n",
        new="",
        test=f"{_TESTS}/model/test_model_families.py::test_family_trains_and_gradient_checkpointing_is_exact",
        fails_with="RunError",
    ),
    Mutation(
        trap=47,
        file=f"{_TRAINER}/stages.py",
        old="return LoadingCheck(task, mean_loss(trainable, rows))",
        new="from qlora_trainer.evaluation.evaluator import compute_metrics\n"
        "    with trainable.evaluating():\n"
        "        return LoadingCheck(task, compute_metrics(trainable, rows, 4, packing=True).loss)",
        test=f"{_TESTS}/publishing/test_load_check.py::test_trap_47_reloaded_adapter_has_the_loss_of_training",
    ),
    Mutation(
        trap=48,
        file=f"{_TRAINER}/prepare.py",
        old="    if tokenized.largest_token >= model.vocabulary:\n",
        new="    if False:\n",
        test=f"{_TESTS}/model/test_weight_check.py::test_trap_48_row_with_a_token_beyond_the_embedding_is_refused",
    ),
    Mutation(
        trap=49,
        file=f"{_TRAINER}/training/agreement.py",
        old="    if len({choice[1:] for choice in choices}) > 1:\n",
        new="    if len(choices) < 1:\n",
        test=f"{_TESTS}/training/test_agreement.py::test_trap_49_processes_that_compute_differently_are_refused",
    ),
    Mutation(
        trap=50,
        file=f"{_TRAINER}/publishing/stop_tokens.py",
        old="        tokenizer = with_eos_token(tokenizer, trained)\n",
        new="",
        test=f"{_TESTS}/publishing/test_stop_tokens.py::test_trap_50_server_stops_at_the_token_that_was_trained",
    ),
    Mutation(
        trap=50,
        file=f"{_TRAINER}/publishing/merge_weights.py",
        old="    if stops := read_stop_tokens(task.adapter):\n",
        new="    if stops := None:\n",
        test=f"{_TESTS}/publishing/test_stop_tokens.py::test_trap_50_merged_model_stops_at_the_token_that_was_trained",
    ),
)

_NO_SHARDING: Final = "no weight is sharded: there is neither FSDP nor ZeRO-3 yet"

NOT_HERE: Final = {
    9: "there is no context parallelism",
    14: _NO_SHARDING,
    15: _NO_SHARDING,
    16: _NO_SHARDING,
    33: "transformers 5.23, to which the trainer is pinned, quantizes while it loads; test_trap_33 checks that",
    35: "the loop is ours, and nothing in it makes a DataParallel; test_trap_35 looks",
}
"""Traps that no code here could fall into, so that there is no fix to take out."""
