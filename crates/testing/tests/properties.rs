//! Every property on every device of `BIFOCAL_TEST_DEVICES` (comma-separated; by default the CPU runtime and,
//! where there is a Vulkan driver, wgpu). A device that is named and not there fails the test.

use std::sync::OnceLock;

use bifocal_testing::{Device, Effort, properties};

fn device(name: &'static str) -> Option<&'static Device> {
    static CPU: OnceLock<Option<Device>> = OnceLock::new();
    static WGPU: OnceLock<Option<Device>> = OnceLock::new();
    static CUDA: OnceLock<Option<Device>> = OnceLock::new();
    let cell = match name {
        "cpu" => &CPU,
        "wgpu" => &WGPU,
        _ => &CUDA,
    };
    cell.get_or_init(|| {
        let named = std::env::var("BIFOCAL_TEST_DEVICES").ok();
        match &named {
            Some(list) if !list.split(',').any(|wanted| wanted.trim() == name) => None,
            None if name == "cuda" => None,
            Some(_) => Some(Device::open(name).expect("a device named in BIFOCAL_TEST_DEVICES")),
            None => Device::open(name).ok(),
        }
    })
    .as_ref()
}

fn holds(device_name: &'static str, property: &str) {
    let Some(device) = device(device_name) else {
        println!("{device_name} is not among the devices under test");
        return;
    };
    // Lavapipe compiles a kernel for seconds: fewer cases there keep the suite to minutes.
    let default = if device_name == "wgpu" { 3 } else { 12 };
    let cases = std::env::var("BIFOCAL_TEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let property = bifocal_testing::property(property).expect("a property of that name");
    if !property.applies(device) {
        println!("{device_name} has nothing that this property is about");
        return;
    }
    if let Err(refutation) = property.check(device, Effort { cases, seed: 2026 }) {
        panic!("{} does not hold on {device_name}: {refutation}", property.claim);
    }
}

macro_rules! on_every_device {
    ($($name:ident)*) => {
        // Tests run in the order of their names. A device does one thing at a time, so that neighbours are to be on different ones.
        $(mod $name {
            #[test] fn cpu() { super::holds("cpu", stringify!($name)) }
            #[test] fn cuda() { super::holds("cuda", stringify!($name)) }
            #[test] fn wgpu() { super::holds("wgpu", stringify!($name)) }
        })*
        const TESTED: &[&str] = &[$(stringify!($name)),*];
    };
}

on_every_device! {
    gates_equal_the_oracle
    choices_equal_the_oracle
    assigned_routes_are_as_told
    nan_scores_never_pass_silently
    plans_equal_the_oracle
    combinations_equal_the_oracle
    attention_equals_the_oracle
    wide_heads_equal_the_oracle
    non_causal_equals_the_oracle
    long_windows_are_full
    the_future_never_matters
    near_and_far_merge_to_full
    chunks_equal_at_once
    strides_do_not_matter
    heads_and_batches_are_independent
    two_runs_agree_bit_for_bit
    aha_equals_the_oracle
    one_reach_for_all_is_that_branch
    one_flipped_route_changes_one_row
    unrouted_rows_stay_untouched
    multi_window_equals_the_oracle
    l2a_equals_the_oracle
    packed_sequences_equal_the_oracle
    packed_sequences_equal_one_by_one
    packed_sequences_never_mix
    routed_packed_sequences_equal_the_oracle
    moments_equal_the_oracle
    moments_merge_in_any_order
    predicted_masses_equal_the_oracle
    normal_keys_are_predicted_to_a_thousandth
    a_nan_key_is_never_routed
    qada_equals_the_oracle
    tau_goes_from_near_to_full
    low_rank_masses_equal_the_oracle
    soft_gates_equal_the_oracle
    static_heads_equal_the_oracle
    switches_equal_the_oracle
    gated_outputs_equal_the_oracle
    caches_equal_their_model
    decode_equals_the_oracle
    decode_is_the_end_of_prefill
    layouts_agree_bit_for_bit
    neighbours_do_not_matter
    gates_flip_between_steps
    page_tables_are_read_anew
    replays_equal_steps
    states_follow_their_cache
    moments_follow_their_cache
    decode_never_sees_what_it_should_not
    products_of_rows_are_plain_sums
    gradients_equal_the_oracle
    a_nan_reaches_no_other_gradient
    gradients_add_up
    selected_gradients_equal_the_oracle
    two_backward_runs_agree_bit_for_bit
    packed_gradients_equal_the_oracle
    gate_gradients_equal_the_oracle
    choice_gradients_equal_the_oracle
    linear_attention_equals_the_oracle
    chunks_of_linear_attention_do_not_matter
    a_state_carries_over
    window_and_linear_see_every_key_once
    a_step_is_the_last_row
    linear_gradients_equal_the_oracle
    two_linear_runs_agree_bit_for_bit
    norm_sums_equal_the_oracle
    rattention_equals_the_oracle
    routed_linear_rows_equal_the_oracle
    aha_linear_equals_the_oracle
    warpgroup_products_are_plain_sums
    long_contexts_equal_all_rows
}

#[test]
fn no_property_is_left_out() {
    let all: Vec<&str> = properties().map(|property| property.name).collect();
    assert_eq!(all, TESTED);
}
