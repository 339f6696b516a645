//! What linear attention satisfies, and RATTENTION, which is made of it.

mod attention;
mod case;
mod norm_sum;
mod rattention;

pub(crate) use self::{
    attention::NAMES,
    case::{Bound, LinearData, linear_cases, linear_cases_of},
    norm_sum::NormData,
    rattention::{Branches, normable, oracle_rattention},
};
use crate::{Property, everywhere};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "linear_attention_equals_the_oracle",
        claim: "every feature map, window, shape, layout, decay and state that comes in gives the oracle's output and state",
        applies: everywhere,
        one_in: 2,
        run: attention::linear_attention_equals_the_oracle,
    },
    Property {
        name: "chunks_of_linear_attention_do_not_matter",
        claim: "whatever the chunks that keys are cut into, outputs, states and gradients are the same",
        applies: everywhere,
        one_in: 2,
        run: attention::chunks_of_linear_attention_do_not_matter,
    },
    Property {
        name: "a_state_carries_over",
        claim: "a call that goes on from the state of another, and from its window, gives what one call gives",
        applies: everywhere,
        one_in: 2,
        run: attention::a_state_carries_over,
    },
    Property {
        name: "window_and_linear_see_every_key_once",
        claim: "a NaN value reaches a row through the window or through the state, through exactly one of them if it is past",
        applies: everywhere,
        one_in: 2,
        run: attention::window_and_linear_see_every_key_once,
    },
    Property {
        name: "a_step_is_the_last_row",
        claim: "decoding token by token gives the rows and the states of one call",
        applies: everywhere,
        one_in: 2,
        run: attention::a_step_is_the_last_row,
    },
    Property {
        name: "linear_gradients_equal_the_oracle",
        claim: "gradients of queries, keys, values and the state that came in are the oracle's, and add to what is there",
        applies: everywhere,
        one_in: 4,
        run: attention::linear_gradients_equal_the_oracle,
    },
    Property {
        name: "two_linear_runs_agree_bit_for_bit",
        claim: "the same linear attention twice, forward and backward, gives the same bits",
        applies: everywhere,
        one_in: 4,
        run: attention::two_linear_runs_agree_bit_for_bit,
    },
    Property {
        name: "norm_sums_equal_the_oracle",
        claim: "the sum of two normed branches and its gradients are the oracle's, whatever types and layouts",
        applies: everywhere,
        one_in: 4,
        run: norm_sum::norm_sums_equal_the_oracle,
    },
    Property {
        name: "rattention_equals_the_oracle",
        claim: "RATTENTION's output and all of its gradients are the oracle's, and its last step gives the last row",
        applies: everywhere,
        one_in: 8,
        run: rattention::rattention_equals_the_oracle,
    },
];
