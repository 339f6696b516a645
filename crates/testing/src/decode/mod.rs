//! What caches and decode steps satisfy.

mod scene;
mod soak;
mod steps;

use crate::{Property, everywhere};

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "caches_equal_their_model",
        claim: "whatever is appended, forked, truncated and freed, contents and free pages are the model's",
        applies: everywhere,
        one_in: 1,
        run: soak::caches_equal_their_model,
    },
    Property {
        name: "decode_equals_the_oracle",
        claim: "a step over sequences of any lengths, by any routes, gives the oracle's output and log-sum-exp",
        applies: everywhere,
        one_in: 1,
        run: steps::decode_equals_the_oracle,
    },
    Property {
        name: "decode_is_the_end_of_prefill",
        claim: "a step gives the last rows of prefill",
        applies: everywhere,
        one_in: 1,
        run: steps::decode_is_the_end_of_prefill,
    },
    Property {
        name: "layouts_agree_bit_for_bit",
        claim: "pages of any size and, where the window is all that is seen, a ring give what a contiguous cache gives",
        applies: everywhere,
        one_in: 1,
        run: steps::layouts_agree_bit_for_bit,
    },
    Property {
        name: "neighbours_do_not_matter",
        claim: "a sequence's step gives the same bits alone and in any company",
        applies: everywhere,
        one_in: 1,
        run: steps::neighbours_do_not_matter,
    },
    Property {
        name: "gates_flip_between_steps",
        claim: "new routes in the same buffer and new tokens are what the next step of the same plan goes by",
        applies: everywhere,
        one_in: 1,
        run: steps::gates_flip_between_steps,
    },
    Property {
        name: "decode_never_sees_what_it_should_not",
        claim: "a NaN key or value reaches exactly the rows that see it, and an invalid route those of its own",
        applies: everywhere,
        one_in: 1,
        run: steps::decode_never_sees_what_it_should_not,
    },
];
