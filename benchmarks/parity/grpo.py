"""t3_grpo_loss: policy losses of flow_grpo, Flow-Factory, GRPO-Guard and Pref-GRPO, with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.parity.comparing import FLOAT32, FLOAT64, Case, Comparisons, Tolerance, case_kind, register_folder
from trainer_client.losses import (
    clipped_policy_loss,
    guard_log_ratio,
    kl_on_means,
    mean_squared_difference,
    policy_log_ratio,
)

register_folder("t3_grpo_loss")


def _leaf(case: Case, name: str) -> Tensor:
    return case[name].clone().requires_grad_()


def _gradients(compare: Comparisons, case: Case, total: Tensor, close: Tolerance, **leaves: Tensor) -> None:
    """Gradients of the total by each leaf, 0 where the total doesn't depend on it."""
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        wanted = case[f"grad_{name}"]
        compare.add(f"gradient by {name}", torch.zeros_like(wanted) if gradient is None else gradient, wanted, close)


@case_kind("flow_grpo_loss")
def flow_grpo_loss(case: Case, compare: Comparisons) -> None:
    cfg, close = case.cfg, FLOAT64 if case["log_prob"].dtype == torch.float64 else FLOAT32
    lp, mean = _leaf(case, "log_prob"), _leaf(case, "prev_sample_mean")
    log_ratio, limit = policy_log_ratio(lp, case["old_log_prob"]), cfg["adv_clip_max"]
    policy = clipped_policy_loss(
        log_ratio, case["advantages"], cfg["clip_range"], cfg["clip_range"], advantage_clip=(-limit, limit)
    )
    kl = kl_on_means(mean, case["prev_sample_mean_ref"], case["std_dev_t"])
    total = policy.loss + cfg["beta"] * kl
    compare.add("ratio", log_ratio.exp(), case["ratio"], close)
    compare.add("policy loss", policy.loss, case["policy_loss"], close)
    if cfg["beta"]:
        compare.add("kl on means, by diffusion", kl, case["kl_loss"], close)
    compare.add("total", total, case["total_loss"], close)
    compare.add("approx_kl", policy.approx_kl, case["approx_kl"], close)
    compare.add("clip fraction", policy.clip_fraction, case["clipfrac"], close)
    compare.add("clip fraction, high", policy.clip_fraction_high, case["clipfrac_gt_one"], close)
    compare.add("clip fraction, low", policy.clip_fraction_low, case["clipfrac_lt_one"], close)
    _gradients(compare, case, total, close, log_prob=lp, prev_sample_mean=mean)


@case_kind("flow_factory_grpo_loss")
def flow_factory_grpo_loss(case: Case, compare: Comparisons) -> None:
    lp = _leaf(case, "log_prob")
    log_ratio = policy_log_ratio(lp, case["old_log_prob"])
    compare.add("ratio", log_ratio.exp(), case["ratio"], FLOAT32)
    _flow_factory(case, compare, lp, _leaf(case, "prev_sample_mean"), log_ratio)


@case_kind("flow_factory_guard_loss")
def flow_factory_guard_loss(case: Case, compare: Comparisons) -> None:
    lp, mean = _leaf(case, "log_prob"), _leaf(case, "prev_sample_mean")
    std = case["std_dev_t"] * (-case["dt"]).sqrt()
    log_ratio = guard_log_ratio(lp, case["old_log_prob"], mean, case["old_next_latents_mean"], std)
    # The reference broadcasts [B] against [B, 1, 1, 1]; its rows are equal because the step is shared.
    compare.add("ratio", log_ratio.exp(), case["ratio"][0, 0, 0], FLOAT32)
    # The paper divides the loss by |dt| as well; this implementation of it doesn't.
    _flow_factory(case, compare, lp, mean, log_ratio)


def _flow_factory(case: Case, compare: Comparisons, lp: Tensor, mean: Tensor, log_ratio: Tensor) -> None:
    velocity, (low, high) = _leaf(case, "noise_pred"), case.cfg["clip_range"]
    policy = clipped_policy_loss(
        log_ratio, case["advantages"], -low, high, advantage_clip=tuple(case.cfg["adv_clip_range"])
    )
    if case.cfg["kl_type"] == "v-based":
        kl = mean_squared_difference(velocity, case["noise_pred_ref"])
    else:
        kl = mean_squared_difference(mean, case["prev_sample_mean_ref"])
    total = policy.loss + case.cfg["kl_beta"] * kl
    compare.add("policy loss", policy.loss, case["policy_loss_pure"], FLOAT32)
    if case.cfg["kl_beta"]:  # the references leave the penalty out where it has no weight
        compare.add("kl", kl, case["kl_div"], FLOAT32)
    compare.add("total", total, case["total_loss"], FLOAT32)
    compare.add("clip fraction, high", policy.clip_fraction_high, case["clip_frac_high"], FLOAT32)
    compare.add("clip fraction, low", policy.clip_fraction_low, case["clip_frac_low"], FLOAT32)
    compare.add("clip fraction", policy.clip_fraction, case["clip_frac_total"], FLOAT32)
    _gradients(compare, case, total, FLOAT32, log_prob=lp, prev_sample_mean=mean, noise_pred=velocity)


@case_kind("pref_grpo_loss")
def pref_grpo_loss(case: Case, compare: Comparisons) -> None:
    cfg, lp, mean = case.cfg, _leaf(case, "log_prob"), _leaf(case, "prev_sample_mean")
    std, limit = case["noise_scale"], cfg["adv_clip_max"]
    weight: Tensor | float
    if cfg["rationorm"]:
        log_ratio = guard_log_ratio(lp, case["old_log_prob"], mean, case["old_prev_sample_mean"], std)
        weight = 1 / case["dt"].abs()
    else:
        log_ratio, weight = policy_log_ratio(lp, case["old_log_prob"]), 1.0
    clip = cfg["clip_range"]
    policy = clipped_policy_loss(
        log_ratio, case["advantages"], clip, clip, advantage_clip=(-limit, limit), weight=weight
    )
    kl = kl_on_means(mean, case["prev_sample_mean_ref"], std)
    total = policy.loss + cfg["kl_beta"] * kl
    compare.add("ratio", log_ratio.exp(), case["ratio"], FLOAT32)
    compare.add("policy loss", policy.loss, case["policy_loss"], FLOAT32)
    if cfg["kl_beta"]:
        compare.add("kl on means, by std", kl, case["kl_loss"], FLOAT32)
    compare.add("total", total, case["total_loss"], FLOAT32)
    _gradients(compare, case, total, FLOAT32, log_prob=lp, prev_sample_mean=mean)
