/// Where in a model a visitor is. The name of a parameter leaves out which variant of an enum it is in, so that it is
/// the same in every kind of attention that has it.
#[derive(Debug, Default)]
pub(crate) struct Path {
    fields: Vec<String>,
    variants: Vec<String>,
}

impl Path {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        let part = name.to_string();
        if is_enum(container) { self.variants.push(part) } else { self.fields.push(part) }
    }

    pub(crate) fn exit(&mut self, container: &str) {
        if is_enum(container) {
            self.variants.pop()
        } else {
            self.fields.pop()
        };
    }

    /// `layers.0.attention.projections.q_proj.weight`
    pub(crate) fn name(&self) -> String {
        self.fields.join(".")
    }

    /// Whether this is a parameter so named inside of that variant.
    pub(crate) fn ends_with(&self, variant: &str, name: &str) -> bool {
        self.variants.last().is_some_and(|inside| inside == variant) && self.name().ends_with(name)
    }
}

fn is_enum(container: &str) -> bool {
    container.starts_with("Enum:")
}
