//! Everything on sale in the demo.

/// The currency of the catalogue; it has two decimals.
pub const CURRENCY: &str = "EUR";

/// A SKU on sale.
pub struct Item {
    pub sku_id: &'static str,
    pub title: &'static str,
    /// In minor units.
    pub unit_price: i64,
    /// Shares of all units and of all clicks.
    pub stock_share: f64,
    pub click_share: f64,
}

/// Everything on sale.
pub const CATALOGUE: [Item; 4] = [
    item("IPHONE-15", "iPhone 15", 199_900, 0.50, 90.0),
    item("AIRPODS-PRO", "AirPods Pro", 29_900, 0.25, 5.0),
    item("WATCH-9", "Watch 9", 49_900, 0.15, 3.0),
    item("HOMEPOD-MINI", "HomePod mini", 9_900, 0.10, 2.0),
];

const fn item(
    sku_id: &'static str,
    title: &'static str,
    unit_price: i64,
    stock_share: f64,
    click_share: f64,
) -> Item {
    Item {
        sku_id,
        title,
        unit_price,
        stock_share,
        click_share,
    }
}
