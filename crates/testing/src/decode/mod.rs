//! What caches and decode steps satisfy.

mod replays;
mod scene;
mod soak;
mod steps;
mod summaries;
mod tables;

use bifocal::DeviceProfile;

use crate::{Property, everywhere};

/// All runtimes but the CPU's record graphs.
fn graphs(profile: &DeviceProfile) -> bool {
    profile.cpu_cores.is_none()
}

pub(crate) const PROPERTIES: &[Property] = &[
    Property {
        name: "caches_equal_their_model",
        claim: "whatever is appended, forked, truncated, freed and moved to another cache, contents and free pages are the model's",
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
        name: "page_tables_are_read_anew",
        claim: "pages of another library give the oracle's output, and other lengths, pages, routes and queries in the same \
                buffers what a fresh step gives",
        applies: everywhere,
        one_in: 2,
        run: tables::page_tables_are_read_anew,
    },
    Property {
        name: "replays_equal_steps",
        claim: "a router and its step, captured once in a graph, give by new hidden states, queries, lengths and pages what they \
                give when launched",
        applies: graphs,
        one_in: 2,
        run: replays::replays_equal_steps,
    },
    Property {
        name: "states_follow_their_cache",
        claim: "whatever is appended, forked, truncated, freed, saved, restored and moved, RATTENTION's step is the oracle's last row",
        applies: everywhere,
        one_in: 4,
        run: summaries::states_follow_their_cache,
    },
    Property {
        name: "moments_follow_their_cache",
        claim: "whatever is appended, forked, truncated, freed, saved, restored and moved, QAdA's step decides and attends as the oracle",
        applies: everywhere,
        one_in: 4,
        run: summaries::moments_follow_their_cache,
    },
    Property {
        name: "decode_never_sees_what_it_should_not",
        claim: "a NaN key or value reaches exactly the rows that see it, and an invalid route those of its own",
        applies: everywhere,
        one_in: 1,
        run: steps::decode_never_sees_what_it_should_not,
    },
];
