/// Implements [`AttentionOperator`](bifocal_core::device::AttentionOperator) for a type, by this engine: operators differ in
/// their name and in the reach that their value has.
///
/// `operator!(Full, "full", |_this| Reach::All);`
#[macro_export]
macro_rules! operator {
    ($operator:ty, $name:literal, |$this:ident| $reach:expr) => {
        const _: () = {
            use ::bifocal_core::{
                DeviceProfile, Problem, Refusal, Result, Routine,
                device::{AttentionOperator, Gradients, Inputs, Partial, Rows, Saved},
            };
            use ::cubecl::client::Client;

            impl AttentionOperator for $operator {
                fn name(&self) -> &'static str {
                    $name
                }

                fn reach(&self) -> ::bifocal_core::Reach {
                    let $this = self;
                    $reach
                }

                fn supports(
                    &self,
                    routine: Routine,
                    problem: &Problem,
                    profile: &DeviceProfile,
                ) -> Result<(), Refusal> {
                    $crate::supports(routine, problem, profile)
                }

                fn attend(
                    &self,
                    client: &Client,
                    problem: &Problem,
                    inputs: &Inputs<'_>,
                    rows: Rows<'_>,
                    partial: &Partial,
                ) -> Result<Routine> {
                    $crate::attend(self.name(), client, problem, inputs, self.reach(), rows, partial)
                }

                fn supports_backward(
                    &self,
                    routine: Routine,
                    problem: &Problem,
                    profile: &DeviceProfile,
                ) -> Result<(), Refusal> {
                    $crate::supports_backward(routine, problem, profile)
                }

                fn backward(
                    &self,
                    client: &Client,
                    problem: &Problem,
                    inputs: &Inputs<'_>,
                    rows: Rows<'_>,
                    saved: &Saved<'_>,
                    gradients: &Gradients,
                ) -> Result<Routine> {
                    let (name, reach) = (self.name(), self.reach());
                    $crate::backward(name, client, problem, inputs, reach, rows, saved, gradients)
                }
            }
        };
    };
}
